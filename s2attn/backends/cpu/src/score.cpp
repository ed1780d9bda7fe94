// Block mass from strided antidiagonals (XAttention, arXiv:2503.16428): the logit of two groups of
// `stride` tokens is the mean of one antidiagonal of their tile, a softmax over the key groups
// follows, and its sums over blocks are the result.
//
// Lanes are query groups. A tile of 64 key groups is one product of depth stride * width, after
// which its exponentials, relative to the tile's own maximum, are summed by key block. What remains
// of a tile are a maximum per lane and a sum per lane and key block; they are rescaled when all
// tiles are known.
#include <algorithm>
#include <new>

#include "pool.h"
#include "work.h"

namespace s2 {
namespace {

constexpr int64_t GROUPS = 64;             // key groups of a tile
constexpr int64_t QUERY_FLOATS = 1 << 18;  // most numbers of the turned queries of one item
constexpr int64_t MOST_PANELS = 4;         // of one item, for each of which a key tile is read once

struct Shape {
    int64_t per_block, groups_q, groups_k, blocks_q, blocks_k;  // groups per block, groups, blocks
    int64_t tiles, per_tile, units;  // key tiles, sums of each, and of all
    int64_t panels, items;           // panels of an item, items of a head

    Shape(const Mass& call) {
        const auto parts = [](int64_t n, int64_t of) { return (n + of - 1) / of; };
        per_block = call.block / call.stride;
        groups_q = parts(call.seqlen_q, call.stride), groups_k = parts(call.seqlen_k, call.stride);
        blocks_q = parts(call.seqlen_q, call.block), blocks_k = parts(call.seqlen_k, call.block);
        tiles = parts(groups_k, GROUPS);
        per_tile = std::max<int64_t>(1, GROUPS / per_block), units = tiles * per_tile;
        const int64_t room = QUERY_FLOATS / (call.stride * call.width * LANES);
        const int64_t whole = std::max<int64_t>(1, per_block / LANES);  // panels of a query block
        panels = std::max(std::clamp<int64_t>(room, 1, MOST_PANELS) / whole, (int64_t)1) * whole;
        items = parts(groups_q, panels * LANES);
    }
};

// Some panels of query groups of one head, against all key groups that they see.
struct Scores {
    const Mass& call;
    const Shape& shape;
    const int64_t batch, head, first;  // first query group
    float factor, cap;
    float *qt, *s, *k, *top, *sum;

    Scores(const Mass& call, const Shape& shape, int64_t batch, int64_t head, int64_t first)
        : call(call), shape(shape), batch(batch), head(head), first(first) {
        factor = (float)(call.softcap > 0 ? call.scale / call.softcap : call.scale * LOG2E);
        cap = (float)(call.softcap * LOG2E);
        const int64_t depth = call.stride * call.width, panels = shape.panels;
        k = scratch(
            GROUPS * call.width + panels * LANES * (depth + GROUPS + shape.tiles + shape.units));
        s = k + GROUPS * call.width;               // k: [GROUPS, width]
        qt = s + panels * GROUPS * LANES;          // s: [panels, GROUPS, LANES]
        top = qt + panels * depth * LANES;         // qt: [panels, stride, width, LANES]
        sum = top + panels * shape.tiles * LANES;  // top: [panels, tiles, LANES]
    }  // sum: [panels, units, LANES]

    // Query groups of a panel, and tokens of a query group or a key group.
    int64_t lanes(int64_t p) const {
        return std::clamp<int64_t>(shape.groups_q - first - p * LANES, 0, LANES);
    }
    int64_t tokens_q(int64_t group) const {
        return std::min(call.stride, call.seqlen_q - group * call.stride);
    }
    int64_t tokens_k(int64_t group) const {
        return std::min(call.stride, call.seqlen_k - group * call.stride);
    }

    // Key groups that a panel sees.
    int64_t seen(int64_t p) const {
        if (lanes(p) == 0) return 0;
        if (!call.causal) return shape.groups_k;
        return std::clamp<int64_t>(call.reach + first + p * LANES + lanes(p), 0, shape.groups_k);
    }

    void run() {
        load_queries();
        int64_t most = 0;
        for (int64_t p = 0; p < shape.panels; p++) most = std::max(most, seen(p));
        for (int64_t start = 0; start < most; start += GROUPS) score_tile(start);
        for (int64_t p = 0; p < shape.panels; p++) add_mass(p);
    }

    // Queries turned, of every group the last one first, over the number of its tokens.
    void load_queries() {
        const int64_t depth = call.stride * call.width;
        std::fill(qt, qt + shape.panels * depth * LANES, 0.0f);
        for (int64_t p = 0; p < shape.panels; p++) {
            const int64_t group = first + p * LANES, count = lanes(p);
            const bool short_last = count > 0 && tokens_q(group + count - 1) < call.stride;
            turn_groups(p, 0, count - short_last);
            if (short_last) turn_groups(p, count - 1, 1);
        }
    }

    // `count` query groups of equal length, from a lane of panel p on.
    void turn_groups(int64_t p, int64_t lane, int64_t count) {
        const int64_t group = first + p * LANES + lane, tokens = tokens_q(group);
        for (int64_t t = 0; t < tokens && count > 0; t++) {
            Matrix from = rows_at(call.q, batch, group * call.stride + tokens - 1 - t, head);
            from.row *= call.stride;
            float* to = qt + (p * call.stride + t) * call.width * LANES + lane;
            load_columns(to, LANES, from, count, call.width, factor / (float)tokens);
        }
    }

    void score_tile(int64_t start) {
        const int64_t groups = std::min(GROUPS, shape.groups_k - start),
                      kv_head = head / (call.heads / call.kv_heads);
        std::fill(s, s + shape.panels * GROUPS * LANES, 0.0f);
        for (int64_t t = 0; t < call.stride; t++) {
            const int64_t token = start * call.stride + t;
            const int64_t count =
                groups - (tokens_k(start + groups - 1) <= t);  // that have such a token
            Matrix from = rows_at(call.k, batch, token, kv_head);
            from.row *= call.stride;
            if (count > 0) load_rows(k, call.width, from, count, call.width);
            for (int64_t p = 0; p < shape.panels; p++)
                if (start < seen(p))
                    gemm_nn_add(count, round_up(lanes(p), W), call.width, k, call.width,
                        qt + (p * call.stride + t) * call.width * LANES, LANES,
                        s + p * GROUPS * LANES, LANES);
        }
        for (int64_t p = 0; p < shape.panels; p++)
            if (start < seen(p)) {
                correct_short_group(p, start, groups);
                sum_tile(p, start, groups);
            }
    }

    // The mean is over the pairs that exist: fewer than the query group's tokens where the last key
    // group is shorter.
    void correct_short_group(int64_t p, int64_t start, int64_t groups) {
        const int64_t tokens = tokens_k(start + groups - 1);
        for (int64_t lane = 0; tokens < call.stride && lane < lanes(p); lane++) {
            const int64_t queries = tokens_q(first + p * LANES + lane);
            s[(p * GROUPS + groups - 1) * LANES + lane] *=
                (float)queries / (float)std::min(queries, tokens);
        }
    }

    // The maximum of each lane over the tile, and the sums of its exponentials by key block.
    void sum_tile(int64_t p, int64_t start, int64_t groups) {
        const int64_t tile = start / GROUPS, each = std::min(GROUPS, shape.per_block),
                      edge = call.reach + first + p * LANES;
        float* tops = top + (p * shape.tiles + tile) * LANES;
        float* sums = sum + (p * shape.units + tile * shape.per_tile) * LANES;
        std::fill(sums, sums + shape.per_tile * LANES, 0.0f);
        for (int64_t j = 0; j < lanes(p); j += W) {
            float* at = s + p * GROUPS * LANES + j;
            V most = set1(-INF);
            for (int64_t i = 0; i < groups; i++) {
                V x = load(at + i * LANES);
                if (call.softcap > 0) x = tanh(x) * cap;
                const int64_t hidden = call.causal ? start + i - edge - j
                                                   : 0;  // the first lanes do not see this group
                if (hidden > 0) x = pick(hidden >= W ? 0 : ~(uint64_t)0 << hidden, x, set1(-INF));
                store(at + i * LANES, x);
                most = max_or_second(x, most);
            }
            store(tops + j, most);
            most = select(most == -INF, V{}, most);
            for (int64_t i = 0; i < groups; i++) {
                float* to = sums + i / each * LANES + j;
                store(to, load(to) + exp2(load(at + i * LANES) - most));
            }
        }
    }

    // The sums of a panel, each lane divided by its denominator, added to the blocks of the result.
    void add_mass(int64_t p) {
        const int64_t tiles = (seen(p) + GROUPS - 1) / GROUPS;
        for (int64_t lane = 0; lane < lanes(p); lane++) {
            const float* tops = top + p * shape.tiles * LANES + lane;
            const float* sums = sum + p * shape.units * LANES + lane;
            float most = -INF, total = 0;
            for (int64_t t = 0; t < tiles; t++) most = std::max(most, tops[t * LANES]);
            const auto scale = [&](int64_t t) {
                return tops[t * LANES] == -INF ? 1.0f : std::exp2(tops[t * LANES] - most);
            };
            for (int64_t u = 0; u < tiles * shape.per_tile; u++)
                total += sums[u * LANES] * scale(u / shape.per_tile);
            const int64_t block = (first + p * LANES + lane) / shape.per_block;
            float* out =
                call.out + ((batch * call.heads + head) * shape.blocks_q + block) * shape.blocks_k;
            for (int64_t u = 0; u < tiles * shape.per_tile; u++)
                if (sums[u * LANES] != 0)  // NaN passes
                    out[u * GROUPS / shape.per_tile / shape.per_block] +=
                        sums[u * LANES] * scale(u / shape.per_tile) / total;
        }
    }
};

}  // namespace
}  // namespace s2

int s2_antidiagonal(const s2::Mass* given) try {
    using namespace s2;
    const Mass& call = *given;
    const Shape shape(call);
    parallel_for(call.batch * call.heads * shape.items, (int)call.threads, [&](int64_t i) {
        const int64_t item = shape.items - 1 - i % shape.items;  // the last ones see the most
        const int64_t head = i / shape.items % call.heads, batch = i / shape.items / call.heads;
        Scores(call, shape, batch, head, item * shape.panels * LANES).run();
    });
    return 0;
} catch (const std::bad_alloc&) {
    return 1;
}
