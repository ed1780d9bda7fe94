// How the heads of a call are grouped, and which logits it has: what forward and backward share.
#pragma once
#include <cmath>
#include <numeric>

#include "api.h"
#include "tensors.h"
#include "vec.h"

namespace s2 {

constexpr float INF = INFINITY;
constexpr double LOG2E = 1.4426950408889634, LN2 = 0.6931471805599453;

// A unit is a run of query heads that share their KV head and their lists.
struct Units {
    int64_t count;       // of one batch entry
    int64_t heads;       // query heads of each
    int64_t per_layout;  // units of each layout head, neighbours
    int64_t per_kv;      // units of each KV head, neighbours

    Units(const Attention& call) {
        count = std::lcm(call.index->heads, call.kv_heads);
        heads = call.heads / count;
        per_layout = count / call.index->heads;
        per_kv = count / call.kv_heads;
    }
};

// How a product x = q.k becomes the exponent of 2: `factor * x`, or `cap * tanh(factor * x)` with a
// soft-cap.
struct Logits {
    float factor, cap;

    Logits(const Attention& call)
        : factor((float)(call.softcap > 0 ? call.scale / call.softcap : call.scale * LOG2E)),
          cap((float)(call.softcap * LOG2E)) {}
};

inline bool all_finite(const float* row, int64_t columns) {
    int wrong = 0;
    for (int64_t c = 0; c < columns; c++) wrong |= !(std::fabs(row[c]) < INF);
    return !wrong;
}

}  // namespace s2
