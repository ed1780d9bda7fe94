// Block-sparse attention, forward: FlashAttention's online softmax (arXiv:2205.14135) with one
// query per vector lane.
//
// An item of work is a strip: some neighboring query blocks of the query heads that share their
// lists. It walks the union of their lists, so that a key tile is read once for all of them. The
// scores of a tile are computed transposed, S^T = K Q^T: the softmax of a query stays in its lane,
// no sum crosses lanes, and the bits of a row depend on nothing but its own keys, in ascending
// order.
#include <algorithm>
#include <new>

#include "bf16.h"
#include "pool.h"
#include "work.h"

namespace s2 {
namespace {

constexpr int64_t KEYS = 64;         // keys of a tile
constexpr int64_t STRIP_ROWS = 512;  // most rows of a strip, unless one block of one head has more
constexpr int64_t MOST_LINES = 8;    // most query blocks of a strip
constexpr int64_t ITEMS = 8;         // strips per thread at least, while they can be made shorter

// The queries of one item: those of query blocks `line` and up of heads `head` and up.
struct Strip {
    int64_t batch, kv_head, layout_head, head, heads, line, lines;
};

// A query block of a strip, and how far its list is walked. Row r is token r % tokens of the
// strip's head r / tokens; LANES rows are a panel.
struct Line {
    int64_t start, tokens, rows, first_panel;
    const int32_t *full, *full_end, *partial, *partial_end, *tile;
    bool listed;           // the tile at hand
    const uint64_t* bits;  // its mask, or null where it is seen in full

    int64_t panels() const { return (rows + LANES - 1) / LANES; }
    int64_t lanes(int64_t panel) const { return std::min<int64_t>(LANES, rows - panel * LANES); }
};

// A key tile.
struct Keys {
    int64_t start, count, offset;  // offset in its block
};

struct Buffers {
    float *qt, *ot, *m, *l, *factor, *s, *k, *v, *k_pairs, *vt_pairs, *p_pairs;

    Buffers(const Attention& call, int64_t panels) {
        const int64_t depth = std::max<int64_t>(call.width, 16), rows = round_up(call.v_width, 16);
        s = scratch(panels * LANES * (depth + rows + 2) + LANES +
                    KEYS * (2 * LANES + call.width + call.v_width + depth + rows));
        qt = s + KEYS * LANES;              // s: [KEYS, LANES]
        ot = qt + panels * LANES * depth;   // qt: [panels, width, LANES], or pairs of width
        m = ot + panels * LANES * rows;     // ot: [panels, v_width, LANES]
        l = m + panels * LANES;             // m, l: [panels, LANES]
        factor = l + panels * LANES;        // [LANES]
        k = factor + LANES;                 // [KEYS, width]
        v = k + KEYS * call.width;          // [KEYS, v_width]
        k_pairs = v + KEYS * call.v_width;  // [KEYS, pairs of width]
        vt_pairs = k_pairs + KEYS * depth;  // [v_width, pairs of KEYS]
        p_pairs = vt_pairs + KEYS * rows;   // [pairs of KEYS, LANES]
    }
};

inline uint32_t* words(float* x) { return reinterpret_cast<uint32_t*>(x); }

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
void panel_bits(uint64_t* bits, const uint64_t* tile, int64_t words, int64_t keys, const Line& line,
    int64_t panel) {
    std::fill(bits, bits + keys, 0);
    const int64_t end = panel * LANES + line.lanes(panel);
    for (int64_t row = panel * LANES; row < end;) {
        const int64_t token = row % line.tokens, shift = token % 64;
        const int64_t count = std::min({end - row, line.tokens - token, 64 - shift});
        const uint64_t ones = count == 64 ? ~(uint64_t)0 : ((uint64_t)1 << count) - 1;
        for (int64_t k = 0; k < keys; k++)
            bits[k] |= (tile[k * words + token / 64] >> shift & ones) << (row - panel * LANES);
        row += count;
    }
}

// One strip of a call, from its first key tile to its results.
struct Forward {
    const Attention& call;
    const Index& index;
    const Strip& strip;
    const Logits logits;
    const bool pairs;                // of bfloat16: products by the processor's own instructions
    const int64_t qt_size, ot_size;  // numbers of a panel
    const int64_t depth;             // words of a packed row of queries or keys
    Line lines[MOST_LINES];
    Buffers own;

    Forward(const Attention& call, const Strip& strip)
        : call(call),
          index(*call.index),
          strip(strip),
          logits(call),
          pairs(call.q.dtype == BFloat16 && bf16_products()),
          qt_size(std::max<int64_t>(call.width, 16) * LANES),
          ot_size(round_up(call.v_width, 16) * LANES),
          depth(round_up(call.width, 32) / 2),
          own(call, set_lines()) {}

    // Returns the number of panels.
    int64_t set_lines() {
        int64_t panels = 0;
        for (int64_t i = 0; i < strip.lines; i++) {
            const int64_t q_block = strip.line + i,
                          n = strip.layout_head * index.q_blocks + q_block;
            const int64_t* ptr = index.ptr + n + strip.layout_head;
            const int64_t tokens = index.q_length[q_block];
            const int32_t* partial = index.idx + ptr[0] + index.full[n];
            lines[i] = {index.q_start[q_block], tokens, strip.heads * tokens, panels,
                index.idx + ptr[0], partial, partial, index.idx + ptr[1],
                index.tile + index.tile_ptr[n], false, nullptr};
            panels += lines[i].panels();
        }
        return panels;
    }

    void run() {
        const Bf16Scope scope(pairs);
        load_queries();
        for (int64_t block = next_block(); block < index.k_blocks;) {
            for (int64_t i = 0; i < strip.lines; i++) list(lines[i], block);
            const int64_t after = next_block(), length = index.k_length[block];
            for (int64_t k = 0; k < length; k += KEYS) {
                const Keys tile{index.k_start[block] + k, std::min(KEYS, length - k), k};
                Keys next{};
                if (k + KEYS < length)
                    next = {tile.start + KEYS, std::min(KEYS, length - k - KEYS), 0};
                else if (after < index.k_blocks)
                    next = {
                        index.k_start[after], std::min<int64_t>(KEYS, index.k_length[after]), 0};
                attend(tile, next);
            }
            block = after;
        }
        store_results();
    }

    // The first key block that some line has not walked yet, or k_blocks.
    int64_t next_block() const {
        int64_t block = index.k_blocks;
        for (int64_t i = 0; i < strip.lines; i++) {
            const Line& line = lines[i];
            if (line.full < line.full_end) block = std::min<int64_t>(block, *line.full);
            if (line.partial < line.partial_end) block = std::min<int64_t>(block, *line.partial);
        }
        return block;
    }

    // Moves a line's list on when it lists this block next.
    void list(Line& line, int64_t block) const {
        line.listed = true, line.bits = nullptr;
        if (line.full < line.full_end && *line.full == block) {
            line.full++;
        } else if (line.partial < line.partial_end && *line.partial == block) {
            line.bits = index.bits + *line.tile * index.block * words_of(index.block);
            line.partial++, line.tile++;
        } else {
            line.listed = false;
        }
    }

    void load_queries() {
        for (int64_t i = 0; i < strip.lines; i++)
            for (int64_t p = 0; p < lines[i].panels(); p++) load_panel(lines[i], p);
    }

    void load_panel(const Line& line, int64_t p) {
        const int64_t panel = line.first_panel + p, lanes = line.lanes(p);
        float *qt = own.qt + panel * qt_size, *m = own.m + panel * LANES,
              *l = own.l + panel * LANES;
        if (lanes % W) std::fill(qt, qt + qt_size, 0.0f);
        for (int64_t lane = 0; lane < lanes;) {
            const int64_t row = p * LANES + lane, token = row % line.tokens;
            const int64_t count = std::min(lanes - lane, line.tokens - token);
            const Matrix from = rows_of(call.q, line, row);
            if (pairs) pack_columns(words(qt) + lane, LANES, depth, from, count, call.width);
            else load_columns(qt + lane, LANES, from, count, call.width, logits.factor);
            lane += count;
        }
        std::fill(m, m + LANES, -INF), std::fill(l, l + LANES, 0.0f);
        std::fill(own.ot + panel * ot_size, own.ot + (panel + 1) * ot_size, 0.0f);
    }

    // The numbers of one row and those after it.
    Matrix rows_of(const Tensor& x, const Line& line, int64_t row) const {
        const int64_t token = line.start + row % line.tokens;
        return rows_at(x, strip.batch, token, strip.head + row / line.tokens);
    }

    // Folds a tile into the sums of the lines that list it, and meanwhile fetches the next one.
    void attend(const Keys& tile, const Keys& next) {
        const int64_t keys = tile.count;
        load_tile(tile);
        Ahead next_k = fetch_rows(keys_at(call.k, next), next.count, call.width);
        Ahead next_v = fetch_rows(keys_at(call.v, next), next.count, call.v_width);
        if (pairs) next_k.fetch(INT32_MAX), next_v.fetch(INT32_MAX);
        for (int64_t i = 0; i < strip.lines; i++) {
            const Line& line = lines[i];
            if (!line.listed) continue;
            const bool broken = line.bits && broken_values(tile);
            for (int64_t p = 0; p < line.panels(); p++) {
                const int64_t lanes = round_up(line.lanes(p), W), panel = line.first_panel + p;
                float *ot = own.ot + panel * ot_size, *m = own.m + panel * LANES;
                score(own.qt + panel * qt_size, keys, lanes, &next_k);
                uint64_t bits[KEYS];
                if (line.bits) {
                    const int64_t count = words_of(index.block);
                    panel_bits(bits, line.bits + tile.offset * count, count, keys, line, p);
                }
                const bool capped = call.softcap > 0;
                const auto step = line.bits
                                      ? (capped ? softmax<true, true> : softmax<true, false>)
                                      : (capped ? softmax<false, true> : softmax<false, false>);
                step(own.s, keys, lanes, bits, logits.cap, m, own.l + panel * LANES, own.factor);
                if (broken) add_broken_values(keys, lanes, bits, ot);
                else add_values(keys, lanes, ot, &next_v);
            }
        }
    }

    void load_tile(const Keys& tile) {
        const Matrix k = keys_at(call.k, tile), v = keys_at(call.v, tile);
        if (pairs) {
            pack_rows(words(own.k_pairs), depth, k, tile.count, call.width);
            pack_turned(
                words(own.vt_pairs), round_up(tile.count, 32) / 2, v, tile.count, call.v_width);
        } else {
            load_rows(own.k, call.width, k, tile.count, call.width);
            load_rows(own.v, call.v_width, v, tile.count, call.v_width);
        }
    }

    // S^T = K Q^T, in base 2
    void score(const float* qt, int64_t keys, int64_t lanes, Ahead* ahead) {
        if (!pairs)
            return gemm_nn(
                keys, lanes, call.width, own.k, call.width, qt, LANES, own.s, LANES, ahead);
        bf16_product(keys, lanes, depth, words(own.k_pairs), words(const_cast<float*>(qt)), own.s);
        for (int64_t k = 0; k < keys; k++)
            for (int64_t j = 0; j < lanes; j += W)
                store(own.s + k * LANES + j, load(own.s + k * LANES + j) * logits.factor);
    }

    // O^T = O^T * factor + V^T P^T
    void add_values(int64_t keys, int64_t lanes, float* ot, Ahead* ahead) {
        if (!pairs)
            return gemm_tn_scale(call.v_width, lanes, keys, own.v, call.v_width, own.s, LANES, ot,
                LANES, own.factor, ahead);
        const int64_t count = round_up(keys, 32) / 2;
        pack_floats(words(own.p_pairs), count, own.s, keys, lanes);
        bf16_scale(
            call.v_width, lanes, count, words(own.vt_pairs), words(own.p_pairs), ot, own.factor);
    }

    // Whether some value of the tile is NaN or infinite; float32 values are then in `own.v`.
    bool broken_values(const Keys& tile) {
        if (pairs) load_rows(own.v, call.v_width, keys_at(call.v, tile), tile.count, call.v_width);
        return !all_finite(own.v, tile.count * call.v_width);
    }

    Matrix keys_at(const Tensor& x, const Keys& tile) const {
        return rows_at(x, strip.batch, tile.start, strip.kv_head);
    }

    // The product with values among which there is NaN or infinity: a query takes nothing from keys
    // that it does not see, not even 0 * NaN.
    void add_broken_values(int64_t keys, int64_t lanes, const uint64_t* bits, float* ot) {
        for (int64_t d = 0; d < call.v_width; d++)
            for (int64_t lane = 0; lane < lanes; lane++) {
                float sum = ot[d * LANES + lane] * own.factor[lane];
                for (int64_t k = 0; k < keys; k++)
                    if (bits[k] >> lane & 1)
                        sum = std::fma(own.s[k * LANES + lane], own.v[k * call.v_width + d], sum);
                ot[d * LANES + lane] = sum;
            }
    }

    void store_results() {
        for (int64_t i = 0; i < strip.lines; i++) {
            const Line& line = lines[i];
            for (int64_t row = 0; row < line.rows;) {
                const int64_t token = row % line.tokens, lane = row % LANES;
                const int64_t count = std::min(LANES - lane, line.tokens - token);
                const int64_t head = strip.head + row / line.tokens,
                              panel = line.first_panel * LANES + row - lane;
                float* lse = call.lse + (strip.batch * call.heads + head) * call.seqlen_q +
                             line.start + token;
                const float *m = own.m + panel + lane, *l = own.l + panel + lane;
                normalize(head, m, l, count, lse, own.factor);
                const float* ot = own.ot + panel / LANES * ot_size + lane;
                store_columns(
                    rows_of(call.out, line, row), ot, LANES, count, call.v_width, own.factor);
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
            // An infinite sink takes all the weight.
            const double share = std::exp(own_max - top),
                         sum = l[i] * share + (sink == top ? 1 : std::exp(sink - top));
            lse[i] = (float)(top + std::log(sum));
            factor[i] = (float)(share / sum);
        }
    }
};

}  // namespace
}  // namespace s2

int s2_forward(const s2::Attention* given) try {
    using namespace s2;
    const Attention& call = *given;
    const Index& index = *call.index;
    const Units units(call);
    const int64_t threads = std::max<int64_t>(call.threads, 1);
    const int64_t tokens = std::max<int64_t>(1, std::min(index.block, call.seqlen_q));
    const int64_t heads = std::clamp<int64_t>(STRIP_ROWS / tokens, 1, units.heads);
    const int64_t chunks = (units.heads + heads - 1) / heads;
    const int64_t all = call.batch * units.count * chunks * index.q_blocks;
    const int64_t room = std::clamp<int64_t>(STRIP_ROWS / (tokens * heads), 1, MOST_LINES);
    const int64_t lines = std::clamp<int64_t>(all / (threads * ITEMS), 1, room);
    const int64_t strips = (index.q_blocks + lines - 1) / lines;
    parallel_for(call.batch * units.count * chunks * strips, (int)threads, [&](int64_t i) {
        // The last rows first, which are the longest ones of a causal layout; neighbors one after
        // another, since they share keys.
        const int64_t line = (strips - 1 - i % strips) * lines, chunk = i / strips % chunks;
        const int64_t rest = i / strips / chunks, batch = rest % call.batch;
        const int64_t unit = rest / call.batch % units.per_layout;
        const int64_t layout_head = index.order[rest / call.batch / units.per_layout];
        const int64_t number = layout_head * units.per_layout + unit, first = chunk * heads;
        const Strip strip{batch, number / units.per_kv, layout_head, number * units.heads + first,
            std::min(heads, units.heads - first), line, std::min(lines, index.q_blocks - line)};
        Forward(call, strip).run();
    });
    return 0;
} catch (const std::bad_alloc&) {
    return 1;
}
