// Attention over pages: a few query rows, and many keys that are read once.
//
// Parts of lists leave unnormalised sums, which are added up in the order of the list.
#include <algorithm>
#include <memory>
#include <new>
#include <vector>

#include "gemm.h"
#include "narrow.h"
#include "pool.h"
#include "rows.h"
#include "strips.h"

namespace s2 {
namespace {

// Up to `TILE` keys of one page.
struct Tile {
    int64_t page, offset, keys;
    int64_t position;      // in the block
    const uint64_t* mask;  // of the block, or null where all are seen
};

// One part of a strip.
struct Run {
    const Decode& call;
    const Strip& strip;
    const int64_t width, v_width;
    float *q, *s, *factor;  // [rows, width], [rows, TILE], [rows]
    float *k, *v;           // [TILE, width] or [width, TILE], [TILE, v_width]
    uint64_t* seen;         // [tokens] bit k where the token sees key k of the tile
    float *o, *m, *l;       // [rows, v_width], [rows], [rows]
    std::vector<Tile> tiles;

    Run(const Decode& call, const Strip& strip, float* sums)
        : call(call), strip(strip), width(padded(call.width)), v_width(padded(call.v_width)) {
        const int64_t rows = strip.rows(), tokens = strip.line.tokens,
                      widest = std::max(width, v_width);
        q = scratch(rows * (width + TILE + 1) + W + TILE * (width + widest) + 2 * tokens + W);
        s = q + rows * width;
        k = s + rows * TILE;
        v = k + TILE * width;
        seen = reinterpret_cast<uint64_t*>(v + TILE * widest);
        factor = reinterpret_cast<float*>(seen + tokens);
        o = sums, m = o + rows * v_width, l = m + rows;
        std::fill(o, m, 0.0f);
        std::fill(m, l, -INF);
        std::fill(l, l + rows, 0.0f);
    }

    // Queries, times everything that a product is multiplied by.
    void load_queries() {
        const double scale = call.scale * (call.k_scale ? call.k_scale[strip.kv_head] : 1.0);
        const float factor = (float)(call.softcap > 0 ? scale / call.softcap : scale * LOG2E);
        const Line& line = strip.line;
        std::fill(q, q + strip.rows() * width, 0.0f);
        for (int64_t h = 0; h < strip.heads; h++)
            load_rows(q + h * line.tokens * width, width,
                rows_at(call.q, 0, line.query, strip.head + h), line.tokens, call.width, factor);
    }

    void run(int64_t first) {
        const int64_t line = strip.layout_head * call.lines + strip.line.row;
        const int64_t full = strip.begin + call.full[line],
                      last = std::min(strip.end, first + strip.step);
        for (int64_t e = first; e < last; e++) {
            const uint64_t* mask = nullptr;
            if (e >= full)
                mask = call.bits + (int64_t)call.tile[call.tile_ptr[line] + e - full] * call.block *
                                       words_of(call.block);
            find_tiles(call.k_position[call.idx[e]], mask);
        }
        if (tiles.empty()) return;
        load_queries();
        for (size_t i = 0; i < tiles.size(); i++)
            attend(tiles[i], i + 1 < tiles.size() ? &tiles[i + 1] : nullptr);
    }

    // The keys of a block in tiles that lie in one page and in one word of a mask.
    void find_tiles(int64_t start, const uint64_t* mask) {
        for (int64_t at = 0, keys; at < call.block; at += keys) {
            const int64_t position = start + at, entry = position / call.page_size;
            const int64_t offset = position % call.page_size;
            keys = std::min({call.block - at, call.page_size - offset, TILE - at % 64});
            Tile tile{0, offset, keys, at, mask};
            if (mask && !(tile.keys = seen_keys(tile))) continue;
            if (entry >= call.table.entries) continue;
            tile.page = call.table.at(strip.line.sequence, strip.kv_head, entry);
            if (tile.page >= 0 && tile.page < call.pages) tiles.push_back(tile);
        }
    }

    // Fills `seen`; the number of keys up to the last one that some token sees.
    int64_t seen_keys(const Tile& tile) {
        const int64_t words = words_of(call.block);
        const uint64_t ones = tile.keys == 64 ? ~(uint64_t)0 : ((uint64_t)1 << tile.keys) - 1;
        uint64_t any = 0;
        for (int64_t t = 0; t < strip.line.tokens; t++) {
            seen[t] =
                tile.mask[(strip.line.low + t) * words + tile.position / 64] >> tile.position % 64 &
                ones;
            any |= seen[t];
        }
        return any ? 64 - __builtin_clzll(any) : 0;
    }

    // Keys and values are fetched while the product before theirs runs.
    void attend(const Tile& tile, const Tile* next) {
        const int64_t rows = strip.rows(),
                      keys = round_up(tile.keys, 16);  // pages hold multiples of 16
        const bool few = rows <= FEW_ROWS, masked = tile.mask != nullptr;
        Ahead ahead_v = ahead_of(call.v, tile, call.v_width), ahead_k;
        if (next) ahead_k = ahead_of(call.k, *next, call.width);
        if (masked) seen_keys(tile);
        if (few) {
            const Matrix from = rows_of(call.k, tile, keys, call.width, width, k, false);
            by_four(rows, [&](int64_t r, auto n) {
                by_element(from.dtype, [&](auto e) {
                    const auto* read = static_cast<const typename decltype(e)::type*>(from.data);
                    dot_rows<n, decltype(e)>(q + r * width, width, read, from.row, (int)keys,
                        (int)width, s + r * TILE, ahead_v);
                });
            });
        } else {
            load_transposed(tile, keys);
            gemm_nn((int)rows, (int)keys, (int)call.width, q, width, k, TILE, s, TILE, &ahead_v);
        }
        softmax((int)keys, masked);
        Matrix from = rows_of(call.v, tile, keys, call.v_width, v_width, v, masked || !few);
        const uint64_t broken = masked ? clear_broken(from, keys) : 0;
        if (few) {
            by_four(rows, [&](int64_t r, auto n) {
                by_element(from.dtype, [&](auto e) {
                    const auto* read = static_cast<const typename decltype(e)::type*>(from.data);
                    weigh_rows<n, decltype(e)>(s + r * TILE, (int)keys, read, from.row,
                        (int)v_width, o + r * v_width, v_width, factor + r, ahead_k);
                });
            });
        } else {
            for (int64_t r = 0; r < rows; r++)
                for (int64_t d = 0; d < v_width; d++) o[r * v_width + d] *= factor[r];
            gemm_nn_add((int)rows, (int)v_width, (int)keys, s, TILE,
                static_cast<const float*>(from.data), from.row, o, v_width, &ahead_k);
        }
        if (broken) add_broken(tile, broken);
    }

    // Rows of a page with zeros up to a multiple of W columns: where they lie, or in float32 in
    // `buffer`.
    Matrix rows_of(const Tensor& x, const Tile& tile, int64_t keys, int64_t columns, int64_t wide,
        float* buffer, bool float32) const {
        const Matrix from = page_rows(x, tile);
        if (from.column == 1 && columns == wide && (x.dtype == Float32 || !float32)) return from;
        load_page(buffer, wide, x, from, keys, columns);
        return {buffer, Float32, wide, 1};
    }

    Ahead ahead_of(const Tensor& x, const Tile& tile, int64_t columns) const {
        const int64_t size = x.dtype == Float8 ? 1 : element_size(x.dtype);
        const Matrix from = page_rows(x, tile);
        return {static_cast<const char*>(from.data), from.column == 1 ? tile.keys : 0,
            from.row * size, columns * size};
    }

    Matrix page_rows(const Tensor& x, const Tile& tile) const {
        const int64_t size = x.dtype == Float8 ? 1 : element_size(x.dtype);
        const int64_t first =
            tile.page * x.stride[0] + tile.offset * x.stride[1] + strip.kv_head * x.stride[2];
        return {static_cast<const char*>(x.data) + first * size, x.dtype, x.stride[1], x.stride[3]};
    }

    void load_page(float* to, int64_t wide, const Tensor& x, Matrix from, int64_t keys,
        int64_t columns) const {
        by_element(x.dtype, [&](auto e) {
            typedef typename decltype(e)::type type;
            for (int64_t i = 0; i < keys; i++) {
                const type* row = static_cast<const type*>(from.data) + i * from.row;
                int64_t d = 0;
                if (from.column == 1)
                    for (; d + W <= columns; d += W)
                        store(to + i * wide + d, decltype(e)::load(row + d));
                for (; d < wide; d += W) {
                    type rest[W] = {};
                    for (int64_t j = 0; j < W && d + j < columns; j++)
                        rest[j] = row[(d + j) * from.column];
                    store(to + i * wide + d, decltype(e)::load(rest));
                }
            }
        });
    }

    // Keys as [width, TILE].
    void load_transposed(const Tile& tile, int64_t keys) const {
        Matrix from = page_rows(call.k, tile);
        if (call.k.dtype == Float8) {
            load_page(v, width, call.k, from, keys, call.width);
            from = {v, Float32, width, 1};
        }
        load_columns(k, TILE, from, keys, call.width);
    }

    // Scores become weights; m and l move on, and `factor` is what earlier sums are multiplied by.
    void softmax(int keys, bool masked) {
        const float cap = (float)(call.softcap * LOG2E);
        for (int64_t h = 0, r = 0; h < strip.heads; h++)
            for (int64_t t = 0; t < strip.line.tokens; t++, r++) {
                float* row = s + r * TILE;
                V top = set1(-INF), sum{};
                for (int j = 0; j < keys; j += W) {
                    V x = load(row + j);
                    if (cap > 0) x = tanh(x) * cap;
                    if (masked) x = pick(seen[t] >> j, x, set1(-INF));
                    store(row + j, x);
                    top = max_or_second(x, top);
                }
                float most = m[r];
                for (int i = 0; i < W; i++) most = std::max(most, top[i]);
                const float base = most == -INF ? 0.0f : most;
                for (int j = 0; j < keys; j += W) {
                    const V p = exp2(load(row + j) - base);
                    sum += p;
                    store(row + j, p);
                }
                float lanes[W];
                store(lanes, sum);
                for (int half = W / 2; half > 0; half /= 2)
                    for (int i = 0; i < half; i++) lanes[i] += lanes[i + half];
                factor[r] = exp2(set1(m[r] - base))[0];
                l[r] = l[r] * factor[r] + lanes[0];
                m[r] = most;
            }
    }

    // NaN and infinite values are 0 in a copy, since 0 * NaN would reach tokens that do not see
    // them, and another order of additions would change their bits; bit k of the result says that
    // key k has some.
    uint64_t clear_broken(Matrix& from, int64_t keys) const {
        const float* values = static_cast<const float*>(from.data);
        uint64_t broken = 0;
        for (int64_t i = 0; i < keys; i++)
            if (!all_finite(values + i * from.row, call.v_width)) broken |= (uint64_t)1 << i;
        if (!broken) return 0;
        for (int64_t i = 0; i < keys; i++) {
            float* to = v + i * v_width;
            if (broken >> i & 1) std::fill(to, to + v_width, 0.0f);
            else if (values != v) std::copy_n(values + i * from.row, v_width, to);
        }
        from = {v, Float32, v_width, 1};
        return broken;
    }

    // Tokens that see keys with such values take them after all.
    void add_broken(const Tile& tile, uint64_t broken) const {
        for (; broken; broken &= broken - 1) {
            const int64_t key = __builtin_ctzll(broken);
            Tile one = tile;
            one.offset += key;
            load_page(k, v_width, call.v, page_rows(call.v, one), 1, call.v_width);
            for (int64_t r = 0; r < strip.rows(); r++)
                if (seen[r % strip.line.tokens] >> key & 1)
                    for (int64_t d = 0; d < v_width; d++)
                        o[r * v_width + d] = std::fma(s[r * TILE + key], k[d], o[r * v_width + d]);
        }
    }
};

// Adds up the parts of a strip in their order and writes its results.
struct Combine {
    const Decode& call;
    const Strip& strip;
    const int64_t v_width, floats;
    const float* sums;

    Combine(const Decode& call, const Strip& strip, const float* sums)
        : call(call),
          strip(strip),
          v_width(padded(call.v_width)),
          floats(part_floats(call, strip)),
          sums(sums) {}

    void run() const {
        const int64_t rows = strip.rows(), tokens = strip.line.tokens;
        float* o = scratch(rows * v_width);
        for (int64_t r = 0; r < rows; r++) row(r, o + r * v_width);
        const int64_t size = element_size(call.q.dtype);
        for (int64_t h = 0; h < strip.heads; h++) {
            char* to = static_cast<char*>(call.out) +
                       (strip.line.query * call.heads + strip.head + h) * call.v_width * size;
            store_rows({to, call.q.dtype, call.heads * call.v_width, 1}, o + h * tokens * v_width,
                v_width, tokens, call.v_width);
        }
    }

    void row(int64_t r, float* o) const {
        const int64_t rows = strip.rows(), head = strip.head + r / strip.line.tokens;
        float most = -INF;
        for (int64_t p = 0; p < strip.parts; p++)
            most = std::max(most, sums[p * floats + rows * v_width + r]);
        const float base = most == -INF ? 0.0f : most;
        std::fill(o, o + v_width, 0.0f);
        float total = 0.0f;
        for (int64_t p = 0; p < strip.parts; p++) {
            const float* part = sums + p * floats;
            const float m = part[rows * v_width + r], l = part[rows * (v_width + 1) + r];
            if (m == -INF && l == 0) continue;
            const float share = exp2(set1(m == -INF ? 0.0f : m - base))[0];
            total += l * share;
            for (int64_t d = 0; d < v_width; d++) o[d] += part[r * v_width + d] * share;
        }
        const float sink = call.sinks ? call.sinks[head] : -INF;
        float* lse = call.lse + head * call.total + strip.line.query + r % strip.line.tokens;
        if (most == -INF && total == 0) {
            *lse = sink;
            return;
        }
        const double own = most * LN2,
                     top = own < sink ? sink : own;  // NaN and infinity of the keys stay
        const double share = std::exp(own - top);
        // An infinite sink takes all the weight.
        const double denominator = total * share + (sink == top ? 1 : std::exp(sink - top));
        *lse = (float)(top + std::log(denominator));
        const float factor =
            (float)(share * (call.v_scale ? call.v_scale[strip.kv_head] : 1.0f) / denominator);
        for (int64_t d = 0; d < v_width; d++) o[d] *= factor;
    }
};

void decode(const Decode& call) {
    const std::vector<Strip> strips = strips_of(call);
    if (strips.empty()) return;
    const std::vector<Part> parts = parts_of(strips);
    const Strip& last = strips.back();
    const std::unique_ptr<float[]> sums(
        new float[last.partial + last.parts * part_floats(call, last)]);
    parallel_for((int64_t)parts.size(), (int)call.threads, [&](int64_t i) {
        const Strip& strip = strips[parts[i].strip];
        float* own = sums.get() + strip.partial + parts[i].number * part_floats(call, strip);
        Run(call, strip, own).run(strip.begin + parts[i].number * strip.step);
    });
    parallel_for((int64_t)strips.size(), (int)call.threads,
        [&](int64_t i) { Combine(call, strips[i], sums.get() + strips[i].partial).run(); });
}

}  // namespace
}  // namespace s2

int s2_decode(const s2::Decode* call) {
    try {
        s2::decode(*call);
    } catch (const std::bad_alloc&) {
        return 1;
    }
    return 0;
}
