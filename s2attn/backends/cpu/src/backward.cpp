// Block-sparse attention, backward: one pass over the entries, five products each, no atomics on
// numbers.
//
// An item of work is a segment: up to SEGMENT entries of one column, for one query head. Lanes are
// keys: S = Q K^T and dP = dO V^T are computed per tile of 64 queries, dK^T and dV^T stay with the
// segment, and dQ of a tile is added to memory. Additions to one place are done in a fixed order,
// whoever computes them: a query block takes its key blocks in ascending order, a key block its
// segments. A segment waits for its turn only when its sums are complete; since items begin in the
// order of the turns, some item can always go on.
#include <algorithm>
#include <atomic>
#include <memory>
#include <new>
#include <vector>

#include "gemm.h"
#include "pool.h"
#include "work.h"

namespace s2 {
namespace {

constexpr int64_t ROWS = 64;     // queries of a tile
constexpr int64_t SEGMENT = 32;  // most entries of a segment

// A part of one column: the numbers of its entries, and its place among the segments of the same
// keys.
struct Segment {
    int32_t batch, head, column, turn, turns;
    int64_t begin, end;
};

// The queries of a tile, and their mask, or null where they see all keys of the column.
struct Queries {
    int64_t start, count;
    const uint64_t* bits;
    int64_t block;
    int32_t turn;  // of the column at this query block
    bool last;     // tile of the block
};

// Sums of a column that several segments add to: dK^T and dV^T.
typedef std::unique_ptr<float[]> Sums;

// What all items share: numbers per query, and whose turn it is.
struct Shared {
    const Attention& call;
    const Gradients& gradients;
    const Index& index;
    const Columns& columns;
    std::vector<float> shift;  // (batch, heads, seqlen_q) lse in base 2; +inf where nothing is
                               // seen, NaN where that is broken
    std::vector<float> low;    // what `shift` lost when it was rounded
    std::vector<float> delta;  // (batch, heads, seqlen_q) sum(dout * out) - dlse
    std::vector<Segment> segments;
    std::vector<std::atomic<int32_t>> row_turn;     // (batch, heads, q_blocks)
    std::vector<std::atomic<int32_t>> column_turn;  // (batch, kv_heads, k_blocks)
    std::vector<Sums> sums;                         // (batch, kv_heads, k_blocks)
    std::atomic<bool> failed{false};

    Shared(const Attention& call, const Gradients& gradients)
        : call(call),
          gradients(gradients),
          index(*call.index),
          columns(*gradients.columns),
          shift(call.batch * call.heads * call.seqlen_q),
          low(shift.size()),
          delta(shift.size()),
          row_turn(call.batch * call.heads * index.q_blocks),
          column_turn(call.batch * call.kv_heads * index.k_blocks),
          sums(column_turn.size()) {
        // Neighboring columns of one head one after another, since they share queries; as many
        // heads at a time as there are threads, so that these seldom wait for each other.
        const int64_t lanes = call.batch * call.kv_heads, step = std::max<int64_t>(call.threads, 1);
        for (int64_t first = 0; first < lanes; first += step)
            for (int64_t j = 0; j < index.k_blocks; j++)
                for (int64_t i = first; i < std::min(first + step, lanes); i++)
                    cut_column(i / call.kv_heads, i % call.kv_heads, j);
    }

    void cut_column(int64_t batch, int64_t kv_head, int64_t column) {
        const int64_t group = call.heads / call.kv_heads;
        const size_t first = segments.size();
        for (int64_t h = kv_head * group; h < (kv_head + 1) * group; h++) {
            const int64_t* ptr = columns.ptr + layout_head(h) * (index.k_blocks + 1) + column;
            for (int64_t e = ptr[0]; e < ptr[1]; e += SEGMENT)
                segments.push_back({(int32_t)batch, (int32_t)h, (int32_t)column, 0, 0, e,
                    std::min(e + SEGMENT, ptr[1])});
        }
        if (segments.size() == first)  // nobody sees these keys: their gradients are 0
            segments.push_back(
                {(int32_t)batch, (int32_t)(kv_head * group), (int32_t)column, 0, 0, 0, 0});
        for (size_t i = first; i < segments.size(); i++)
            segments[i].turn = (int32_t)(i - first),
            segments[i].turns = (int32_t)(segments.size() - first);
    }

    int64_t layout_head(int64_t head) const { return head * index.heads / call.heads; }

    void wait_for(const std::atomic<int32_t>& turn, int32_t mine) const {
        for (int i = 0; turn.load(std::memory_order_acquire) != mine; i++) {
            if (failed.load(std::memory_order_relaxed)) throw std::bad_alloc();
            wait_a_little(i);
        }
    }

    // shift and delta of 64 queries of one head.
    void prepare(int64_t batch, int64_t head, int64_t start) {
        const int64_t count = std::min(ROWS, call.seqlen_q - start),
                      first = (batch * call.heads + head) * call.seqlen_q + start;
        float *o = scratch(2 * ROWS * call.v_width), *d = o + ROWS * call.v_width;
        load_rows(o, call.v_width, rows_at(call.out, batch, start, head), count, call.v_width);
        load_rows(
            d, call.v_width, rows_at(gradients.dout, batch, start, head), count, call.v_width);
        for (int64_t i = 0; i < count; i++) {
            const float *out = o + i * call.v_width, *dout = d + i * call.v_width,
                        lse = call.lse[first + i];
            double sum = 0;  // delta is subtracted from sums of the same size
            for (int64_t c = 0; c < call.v_width; c++) sum += (double)dout[c] * out[c];
            delta[first + i] = (float)(sum - (gradients.dlse ? gradients.dlse[first + i] : 0.0f));
            const bool finite = all_finite(out, call.v_width),
                       sound = finite && std::fabs(lse) < INF;
            const bool weightless = lse == -INF || (finite && lse == INF);  // of an infinite sink
            const double exact = lse * LOG2E;
            shift[first + i] = sound ? (float)exact : weightless ? INF : NAN;
            low[first + i] = sound ? (float)(exact - (float)exact) : 0.0f;
        }
    }
};

// One segment, from its keys to the sums of their gradients.
struct Backward {
    Shared& shared;
    const Attention& call;
    const Index& index;
    const Segment& segment;
    const Logits logits;
    const int64_t kv_head, start, keys, panels, padded;
    float *kt, *vt, *dkt, *dvt, *k, *q, *dout, *s, *dp, *dq;

    Backward(Shared& shared, const Segment& segment)
        : shared(shared),
          call(shared.call),
          index(shared.index),
          segment(segment),
          logits(call),
          kv_head(segment.head / (call.heads / call.kv_heads)),
          start(index.k_start[segment.column]),
          keys(index.k_length[segment.column]),
          panels((keys + LANES - 1) / LANES),
          padded(round_up(call.width, W)) {
        const int64_t lanes = panels * LANES, both = call.width + call.v_width;
        kt = scratch(lanes * (2 * both + padded) + ROWS * (both + padded + 2 * LANES));
        vt = kt + lanes * call.width;     // kt, dkt: [panels, width, LANES]
        dkt = vt + lanes * call.v_width;  // vt, dvt: [panels, v_width, LANES]
        dvt = dkt + lanes * call.width;
        k = dvt + lanes * call.v_width;   // [keys, padded]
        q = k + lanes * padded;           // [ROWS, width]
        dout = q + ROWS * call.width;     // [ROWS, v_width]
        dq = dout + ROWS * call.v_width;  // [ROWS, padded]
        s = dq + ROWS * padded;           // [ROWS, LANES]
        dp = s + ROWS * LANES;            // [ROWS, LANES]
    }

    void run() {
        if (segment.begin == segment.end) {
            std::fill(dkt, k, 0.0f);
            return store_sums();
        }
        load_keys();
        const Columns& columns = shared.columns;
        const int64_t layout_head = shared.layout_head(segment.head);
        const int64_t line = layout_head * index.k_blocks + segment.column,
                      words = words_of(index.block);
        const int64_t full = columns.ptr[line + layout_head] + columns.full[line];
        Queries tile{};
        for (int64_t e = segment.begin; e < segment.end; e++) {
            const int64_t block = columns.idx[e], length = index.q_length[block];
            const uint64_t* bits = nullptr;
            if (e >= full)
                bits = columns.bits + (int64_t)columns.tile[columns.tile_ptr[line] + e - full] *
                                          index.block * words;
            for (int64_t r = 0; r < length; r += ROWS) {
                const Queries next{index.q_start[block] + r, std::min(ROWS, length - r),
                    bits ? bits + r * words : nullptr, block, columns.rank[e], r + ROWS >= length};
                if (tile.count) differentiate(tile, next);
                tile = next;
            }
        }
        if (tile.count) differentiate(tile, {});
        add_sums();
    }

    void load_keys() {
        const Matrix keys_at = rows_at(call.k, segment.batch, start, kv_head),
                     values_at = rows_at(call.v, segment.batch, start, kv_head);
        const int64_t lanes = panels * LANES;
        std::fill(kt, kt + lanes * 2 * (call.width + call.v_width), 0.0f);
        std::fill(k, k + lanes * padded, 0.0f);
        load_rows(k, padded, keys_at, keys, call.width, (float)call.scale);
        for (int64_t i = 0; i < keys; i++)  // for dQ = dS K: dS is 0 where a broken key is not seen
            if (!all_finite(k + i * padded, call.width))
                std::fill(k + i * padded, k + (i + 1) * padded, 0.0f);
        for (int64_t p = 0; p < panels; p++) {
            const int64_t count = std::min<int64_t>(LANES, keys - p * LANES),
                          size = element_size(call.k.dtype);
            const auto from = [&](const Matrix& x) {
                return Matrix{static_cast<const char*>(x.data) + p * LANES * x.row * size, x.dtype,
                    x.row, x.column};
            };
            load_columns(kt + p * LANES * call.width, LANES, from(keys_at), count, call.width);
            load_columns(
                vt + p * LANES * call.v_width, LANES, from(values_at), count, call.v_width);
        }
    }

    // Adds what a tile gives to dK^T, dV^T and dQ, and meanwhile fetches the next one.
    void differentiate(const Queries& tile, const Queries& next) {
        const int64_t rows = tile.count, words = words_of(index.block);
        const int64_t number =
            (segment.batch * call.heads + segment.head) * call.seqlen_q + tile.start;
        const float *shift = shared.shift.data() + number, *low = shared.low.data() + number;
        const float* delta = shared.delta.data() + number;
        // Scaled as in the forward: the scores have the same bits, and P errs less.
        load_rows(q, call.width, queries_at(call.q, tile), rows, call.width, logits.factor);
        load_rows(dout, call.v_width, queries_at(shared.gradients.dout, tile), rows, call.v_width);
        Ahead next_q = fetch_rows(queries_at(call.q, next), next.count, call.width);
        Ahead next_dout =
            fetch_rows(queries_at(shared.gradients.dout, next), next.count, call.v_width);
        Ahead own_dq = fetch_rows(dq_of(tile), rows, call.width);
        const bool silent = silence(rows, shift);
        const bool masked = tile.bits || silent, capped = call.softcap > 0;
        const auto step = masked ? (capped ? gradient<true, true> : gradient<true, false>)
                                 : (capped ? gradient<false, true> : gradient<false, false>);
        for (int64_t p = 0; p < panels; p++) {
            const int64_t count = std::min<int64_t>(LANES, keys - p * LANES),
                          lanes = round_up(count, W);
            const int64_t panel = p * LANES * call.width, v_panel = p * LANES * call.v_width;
            gemm_nn(rows, lanes, call.width, q, call.width, kt + panel, LANES, s, LANES, &own_dq);
            gemm_nn(rows, lanes, call.v_width, dout, call.v_width, vt + v_panel, LANES, dp, LANES);
            uint64_t bits[ROWS];
            for (int64_t i = 0; masked && i < rows; i++)
                bits[i] = !(shift[i] < INF) ? 0
                          : tile.bits       ? tile.bits[i * words + p]
                                            : ~(uint64_t)0;
            step(s, dp, rows, lanes, bits, logits.cap, shift, low, delta);
            if (masked && !all_finite(delta, rows)) add_poisoned(rows, count, bits, dvt + v_panel);
            else
                gemm_tn_add(call.v_width, lanes, rows, dout, call.v_width, s, LANES, dvt + v_panel,
                    LANES, &next_q);
            gemm_tn_add(
                call.width, lanes, rows, q, call.width, dp, LANES, dkt + panel, LANES, &next_dout);
            if (p == 0) gemm_nn(rows, padded, count, dp, LANES, k, padded, dq, padded);
            else
                gemm_nn_add(
                    rows, padded, count, dp, LANES, k + p * LANES * padded, padded, dq, padded);
        }
        for (int64_t i = 0; silent && i < rows; i++)
            if (std::isnan(shift[i])) std::fill(dq + i * padded, dq + (i + 1) * padded, NAN);
        add_dq(tile);
    }

    Matrix queries_at(const Tensor& x, const Queries& tile) const {
        return rows_at(x, segment.batch, tile.start, segment.head);
    }

    Matrix dq_of(const Queries& tile) const {
        const int64_t row =
            (segment.batch * call.seqlen_q + tile.start) * call.heads + segment.head;
        return {shared.gradients.dq + row * call.width, Float32, call.heads * call.width, 1};
    }

    // Clears the queries that add nothing, since they see nothing or something broken; whether
    // there are any.
    bool silence(int64_t rows, const float* shift) {
        bool any = false;
        for (int64_t i = 0; i < rows; i++)
            if (!(shift[i] < INF)) {
                any = true;
                std::fill(q + i * call.width, q + (i + 1) * call.width, 0.0f);
                std::fill(dout + i * call.v_width, dout + (i + 1) * call.v_width, 0.0f);
            }
        return any;
    }

    // Scores become P, and products with the values dS; both are 0 where masked.
    template <bool masked, bool capped>
    static void gradient(float* s, float* dp, int64_t rows, int64_t lanes, const uint64_t* bits,
        float cap, const float* shift, const float* low, const float* delta) {
        for (int64_t i = 0; i < rows; i++)
            for (int64_t j = 0; j < lanes; j += W) {
                float *s_at = s + i * LANES + j, *dp_at = dp + i * LANES + j;
                V x = load(s_at), bent{};
                if (capped) bent = tanh(x), x = bent * cap;
                // Logits beyond 1e30 round by more than exp2 can take.
                const V over = x - shift[i] - low[i];
                V p = exp2(select(over > 0.0f, V{}, over)), ds = p * (load(dp_at) - delta[i]);
                if (capped) ds *= 1.0f - bent * bent;
                if (masked) p = pick(bits[i] >> j, p, V{}), ds = pick(bits[i] >> j, ds, V{});
                store(s_at, p), store(dp_at, ds);
            }
    }

    // dV^T += dO^T P where some dO is NaN or infinite: keys that such a query does not see take
    // nothing from it.
    void add_poisoned(int64_t rows, int64_t count, const uint64_t* bits, float* sum) {
        for (int64_t c = 0; c < call.v_width; c++)
            for (int64_t j = 0; j < count; j++)
                for (int64_t i = 0; i < rows; i++)
                    if (bits[i] >> j & 1)
                        sum[c * LANES + j] = std::fma(
                            dout[i * call.v_width + c], s[i * LANES + j], sum[c * LANES + j]);
    }

    // Adds to dQ when it is this column's turn.
    void add_dq(const Queries& tile) {
        const int64_t head = segment.batch * call.heads + segment.head;
        std::atomic<int32_t>& turn = shared.row_turn[head * index.q_blocks + tile.block];
        shared.wait_for(turn, tile.turn);
        const Matrix to = dq_of(tile);
        for (int64_t i = 0; i < tile.count; i++) {
            float* __restrict row = static_cast<float*>(const_cast<void*>(to.data)) + i * to.row;
            for (int64_t d = 0; d < call.width; d++) row[d] += dq[i * padded + d];
        }
        if (tile.last) turn.store(tile.turn + 1, std::memory_order_release);
    }

    // Adds dK^T and dV^T to those of the segments before, and writes dK and dV after the last one.
    void add_sums() {
        const int64_t place =
            (segment.batch * call.kv_heads + kv_head) * index.k_blocks + segment.column;
        if (segment.turns == 1) return store_sums();
        const int64_t floats = panels * LANES * (call.width + call.v_width);
        shared.wait_for(shared.column_turn[place], segment.turn);
        Sums& sums = shared.sums[place];
        if (segment.turn == 0) {
            sums.reset(new float[floats]);
            std::copy(dkt, dkt + floats, sums.get());
        } else if (segment.turn + 1 < segment.turns) {
            for (int64_t i = 0; i < floats; i++) sums[i] += dkt[i];
        } else {
            for (int64_t i = 0; i < floats; i++) dkt[i] = sums[i] + dkt[i];
            sums.reset();
            store_sums();
        }
        shared.column_turn[place].store(segment.turn + 1, std::memory_order_release);
    }

    void store_sums() {
        float scales[LANES], ones[LANES];
        std::fill(scales, scales + LANES, (float)(call.softcap > 0 ? call.softcap : LN2)),
            std::fill(ones, ones + LANES, 1.0f);
        for (int64_t p = 0; p < panels; p++) {
            const int64_t count = std::min<int64_t>(LANES, keys - p * LANES),
                          token = start + p * LANES;
            const Matrix dk = rows_at(shared.gradients.dk, segment.batch, token, kv_head);
            const Matrix dv = rows_at(shared.gradients.dv, segment.batch, token, kv_head);
            store_columns(dk, dkt + p * LANES * call.width, LANES, count, call.width, scales);
            store_columns(dv, dvt + p * LANES * call.v_width, LANES, count, call.v_width, ones);
        }
    }
};

}  // namespace
}  // namespace s2

int s2_backward(const s2::Attention* call, const s2::Gradients* gradients) try {
    using namespace s2;
    Shared shared(*call, *gradients);
    const int64_t tiles = (call->seqlen_q + ROWS - 1) / ROWS;
    parallel_for(call->batch * call->heads * tiles, (int)call->threads, [&](int64_t i) {
        shared.prepare(i / tiles / call->heads, i / tiles % call->heads, i % tiles * ROWS);
    });
    parallel_for((int64_t)shared.segments.size(), (int)call->threads, [&](int64_t i) {
        try {
            Backward(shared, shared.segments[i]).run();
        } catch (const std::bad_alloc&) {
            shared.failed = true;
            throw;
        }
    });
    return 0;
} catch (const std::bad_alloc&) {
    return 1;
}
