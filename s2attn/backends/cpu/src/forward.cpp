// Block-sparse attention, forward: FlashAttention's online softmax (arXiv:2205.14135) with one
// query per vector lane.
//
// An item of work is a strip: the queries of one block, of all query heads that share its list. The
// scores of a key tile are computed transposed, S^T = K Q^T, so that keys and values are read where
// they lie, number by number, and the softmax of a query stays in its lane: no sum ever crosses
// lanes, and the bits of a row depend on nothing but its own keys, in the order of its list.
#include <algorithm>
#include <new>

#include "gemm.h"
#include "pool.h"
#include "work.h"

namespace s2 {
namespace {

constexpr int64_t KEYS = 64;         // keys of a tile
constexpr int64_t STRIP_ROWS = 256;  // most rows of a strip that holds several heads

// The queries of one item, row r being token r % tokens of query head `head + r / tokens`; 64 rows
// are a panel.
struct Strip {
    int64_t batch, kv_head, head, heads, line_of_head, start, tokens;

    int64_t rows() const { return heads * tokens; }
    int64_t panels() const { return (rows() + LANES - 1) / LANES; }
    int64_t lanes(int64_t panel) const { return std::min<int64_t>(LANES, rows() - panel * LANES); }
};

struct Buffers {
    float *qt, *ot, *m, *l, *factor, *s, *k, *v;

    static int64_t floats(const Attention& call, int64_t panels) {
        return panels * LANES * (call.width + call.v_width + 2) + LANES +
               KEYS * (LANES + call.width + call.v_width);
    }

    Buffers(const Attention& call, int64_t panels) {
        s = scratch(floats(call, panels));       // [KEYS, LANES]
        qt = s + KEYS * LANES;                   // [panels, width, LANES]
        ot = qt + panels * LANES * call.width;   // [panels, v_width, LANES]
        m = ot + panels * LANES * call.v_width;  // [panels, LANES]
        l = m + panels * LANES;                  // [panels, LANES]
        factor = l + panels * LANES;             // [LANES]
        k = factor + LANES;                      // [KEYS, width]
        v = k + KEYS * call.width;               // [KEYS, v_width]
    }
};

// The online softmax of N vectors of lanes: scores become probabilities, `m` and `l` move on,
// `factor` is what earlier sums are multiplied by.
template <int N, bool masked, bool capped>
void softmax_step(float* s, int64_t keys, const uint64_t* bits, int shift, float cap, float* m,
    float* l, float* factor) {
    V old[N], top[N], sum[N];
    for (int j = 0; j < N; j++) old[j] = top[j] = load(m + j * W), sum[j] = V{};
    for (int64_t k = 0; k < keys; k++)
        for (int j = 0; j < N; j++) {
            float* at = s + k * LANES + j * W;
            V x = load(at);
            if (capped) x = tanh(x) * cap;
            if (masked) x = pick(bits[k] >> (shift + j * W), x, set1(-INF));
            if (capped || masked) store(at, x);
            top[j] = max_or_second(x, top[j]);
        }
    for (int j = 0; j < N; j++) {
        store(m + j * W, top[j]);
        top[j] = select(
            top[j] == -INF, V{}, top[j]);  // nothing seen yet: exponents are -inf and not NaN
        const V f = exp2(old[j] - top[j]);
        store(factor + j * W, f);
        old[j] = load(l + j * W) * f;
    }
    for (int64_t k = 0; k < keys; k++)
        for (int j = 0; j < N; j++) {
            float* at = s + k * LANES + j * W;
            const V p = exp2(load(at) - top[j]);
            sum[j] += p;
            store(at, p);
        }
    for (int j = 0; j < N; j++) store(l + j * W, old[j] + sum[j]);
}

template <bool masked, bool capped>
void softmax(float* s, int64_t keys, int64_t lanes, const uint64_t* bits, float cap, float* m,
    float* l, float* factor) {
    int64_t j = 0;
    for (; j + NV * W <= lanes; j += NV * W)
        softmax_step<NV, masked, capped>(s + j, keys, bits, (int)j, cap, m + j, l + j, factor + j);
    for (; j < lanes; j += W)
        softmax_step<1, masked, capped>(s + j, keys, bits, (int)j, cap, m + j, l + j, factor + j);
}

// Bits of the lanes of one panel, key by key, from a mask tile.
void panel_bits(uint64_t* bits, const uint64_t* tile, int64_t words, int64_t keys,
    const Strip& strip, int64_t panel) {
    std::fill(bits, bits + keys, 0);
    const int64_t end = panel * LANES + strip.lanes(panel);
    for (int64_t row = panel * LANES; row < end;) {
        const int64_t token = row % strip.tokens, shift = token % 64;
        const int64_t count = std::min({end - row, strip.tokens - token, 64 - shift});
        const uint64_t ones = count == 64 ? ~(uint64_t)0 : ((uint64_t)1 << count) - 1;
        for (int64_t k = 0; k < keys; k++)
            bits[k] |= (tile[k * words + token / 64] >> shift & ones) << (row - panel * LANES);
        row += count;
    }
}

// One strip of a call, from its first key tile to its results.
struct Forward {
    const Attention& call;
    const Strip& strip;
    const Logits logits;
    Buffers own;

    Forward(const Attention& call, const Strip& strip)
        : call(call), strip(strip), logits(call), own(call, strip.panels()) {}

    void run() {
        load_queries();
        const Index& index = *call.index;
        const int64_t line = strip.line_of_head, begin = index.ptr[line + line / index.q_blocks];
        const int64_t end = index.ptr[line + line / index.q_blocks + 1],
                      full = begin + index.full[line];
        for (int64_t e = begin; e < end; e++) {
            const int64_t words = words_of(index.block), block = index.idx[e];
            const uint64_t* tile = nullptr;
            if (e >= full)
                tile = index.bits +
                       (int64_t)index.tile[index.tile_ptr[line] + e - full] * index.block * words;
            for (int64_t k = 0; k < index.k_length[block]; k += KEYS)
                attend(index.k_start[block] + k, std::min<int64_t>(KEYS, index.k_length[block] - k),
                    tile ? tile + k * words : nullptr);
        }
        store_results();
    }

    void load_queries() {
        const int64_t rows = strip.rows();
        for (int64_t p = 0; p < strip.panels(); p++) {
            const int64_t padded = round_up(strip.lanes(p), W);
            float* qt = own.qt + p * LANES * call.width;
            for (int64_t row = p * LANES, end = row + strip.lanes(p); row < end;) {
                const int64_t token = row % strip.tokens,
                              count = std::min(end - row, strip.tokens - token);
                const Matrix from = rows_at(
                    call.q, strip.batch, strip.start + token, strip.head + row / strip.tokens);
                load_columns(qt + row - p * LANES, LANES, from, count, call.width, logits.factor);
                row += count;
            }
            for (int64_t d = 0; d < call.width; d++)
                for (int64_t lane = strip.lanes(p); lane < padded; lane++) qt[d * LANES + lane] = 0;
        }
        std::fill(own.ot, own.ot + strip.panels() * LANES * call.v_width, 0.0f);
        std::fill(own.m, own.m + round_up(rows, LANES), -INF);
        std::fill(own.l, own.l + round_up(rows, LANES), 0.0f);
    }

    // Folds `keys` keys from token `start` on into the sums; `tile` is the mask from the first of
    // them on, or null where all are seen.
    void attend(int64_t start, int64_t keys, const uint64_t* tile) {
        const Rows k(rows_at(call.k, strip.batch, start, strip.kv_head), keys, call.width,
            own.k);  // [keys, width]
        const Rows v(rows_at(call.v, strip.batch, start, strip.kv_head), keys, call.v_width,
            own.v);  // [keys, v_width]
        const bool broken = tile && !finite_values(v, keys);
        for (int64_t p = 0; p < strip.panels(); p++) {
            const int64_t lanes = round_up(strip.lanes(p), W);
            float *m = own.m + p * LANES, *l = own.l + p * LANES,
                  *ot = own.ot + p * LANES * call.v_width;
            gemm_nn(keys, lanes, call.width, k.data, k.stride, own.qt + p * LANES * call.width,
                LANES, own.s, LANES);
            uint64_t bits[KEYS];
            if (tile) panel_bits(bits, tile, words_of(call.index->block), keys, strip, p);
            const bool capped = call.softcap > 0;
            const auto step = tile ? (capped ? softmax<true, true> : softmax<true, false>)
                                   : (capped ? softmax<false, true> : softmax<false, false>);
            step(own.s, keys, lanes, bits, logits.cap, m, l, own.factor);
            if (broken) add_broken_values(v, keys, lanes, bits, ot);
            else
                gemm_tn_scale(call.v_width, lanes, keys, v.data, v.stride, own.s, LANES, ot, LANES,
                    own.factor);
        }
    }

    bool finite_values(const Rows& v, int64_t keys) const {
        for (int64_t k = 0; k < keys; k++)
            if (!all_finite(v.data + k * v.stride, call.v_width)) return false;
        return true;
    }

    // The product with values among which there is NaN or infinity: a query takes nothing from keys
    // that it does not see, not even 0 * NaN.
    void add_broken_values(
        const Rows& v, int64_t keys, int64_t lanes, const uint64_t* bits, float* ot) {
        for (int64_t d = 0; d < call.v_width; d++)
            for (int64_t lane = 0; lane < lanes; lane++) {
                float sum = ot[d * LANES + lane] * own.factor[lane];
                for (int64_t k = 0; k < keys; k++)
                    if (bits[k] >> lane & 1)
                        sum = std::fma(v.data[k * v.stride + d], own.s[k * LANES + lane], sum);
                ot[d * LANES + lane] = sum;
            }
    }

    void store_results() {
        for (int64_t p = 0; p < strip.panels(); p++) {
            for (int64_t row = p * LANES, end = row + strip.lanes(p); row < end;) {
                const int64_t token = row % strip.tokens,
                              count = std::min(end - row, strip.tokens - token);
                const int64_t head = strip.head + row / strip.tokens, lane = row - p * LANES;
                float* lse = call.lse + (strip.batch * call.heads + head) * call.seqlen_q +
                             strip.start + token;
                normalize(head, own.m + row, own.l + row, count, lse, own.factor + lane);
                const Matrix to = rows_at(call.out, strip.batch, strip.start + token, head);
                store_columns(to, own.ot + p * LANES * call.v_width + lane, LANES, count,
                    call.v_width, own.factor + lane);
                row += count;
            }
        }
    }

    // lse, and what the sums are multiplied by, of `count` rows of one head; its sink joins the
    // denominator here.
    void normalize(int64_t head, const float* m, const float* l, int64_t count, float* lse,
        float* factor) const {
        const float sink = call.sinks ? call.sinks[head] : -INF;
        for (int64_t i = 0; i < count; i++) {
            if (m[i] == -INF && l[i] == 0) {
                lse[i] = sink, factor[i] = 0;
                continue;
            }
            const double own_max = m[i] * LN2,
                         top = own_max < sink ? sink : own_max;  // NaN and +inf of the keys stay
            const double share = std::exp(own_max - top), sum = l[i] * share + std::exp(sink - top);
            lse[i] = (float)(top + std::log(sum));
            factor[i] = (float)(share / sum);
        }
    }
};

}  // namespace
}  // namespace s2

int s2_forward(const s2::Attention* given) {
    using namespace s2;
    const Attention& call = *given;
    const Index& index = *call.index;
    const Units units(call);
    const int64_t tokens = std::min(index.block, call.seqlen_q);
    const int64_t heads = std::max<int64_t>(
        1, std::min(units.heads, STRIP_ROWS / std::max<int64_t>(tokens, 1)));  // of a strip
    const int64_t chunks = (units.heads + heads - 1) / heads,
                  per_line = call.batch * units.per_layout * chunks;
    const auto item = [&](int64_t i) {
        const int64_t line = index.order[i / per_line], layout_head = line / index.q_blocks,
                      q_block = line % index.q_blocks;
        const int64_t rest = i % per_line, batch = rest / (units.per_layout * chunks),
                      chunk = rest % chunks;
        const int64_t unit = layout_head * units.per_layout + rest / chunks % units.per_layout;
        const int64_t first = chunk * heads;
        const Strip strip{batch, unit / units.per_kv, unit * units.heads + first,
            std::min(heads, units.heads - first), line, index.q_start[q_block],
            index.q_length[q_block]};
        Forward(call, strip).run();
    };
    try {
        parallel_for(index.heads * index.q_blocks * per_line, (int)call.threads, item);
    } catch (const std::bad_alloc&) {
        return 1;
    }
    return 0;
}
