// The pool and the ordered sums of the backward without Python, for ThreadSanitizer: `make
// cpu-sanitize`.
//
// Dense causal attention of two heads, forward and backward, by one thread and by several, from two
// threads at a time; prints "ok" when all bits agree.
#include <cstdio>
#include <cstring>
#include <thread>
#include <vector>

#include "api.h"

using namespace s2;

constexpr int64_t HEADS = 2, BLOCK = 16, BLOCKS = 12, LENGTH = BLOCK * BLOCKS, WIDTH = 16;

// Every row lists all blocks before its own in full, and its own through a triangle.
struct Lists {
    std::vector<int64_t> ptr, tile_ptr, column_ptr, column_tile_ptr;
    std::vector<int32_t> full, idx, tile, column_full, column_idx, column_tile, rank, start, length,
        order{0};
    std::vector<uint64_t> bits, column_bits;
    Index index;
    Columns columns;

    Lists() {
        ptr.push_back(0), column_ptr.push_back(0);
        for (int32_t i = 0; i < BLOCKS; i++) {
            for (int32_t j = 0; j <= i; j++) idx.push_back(j);
            for (int32_t j = i + 1; j < BLOCKS; j++) column_idx.push_back(j);
            column_idx.push_back(i);
            full.push_back(i), column_full.push_back((int32_t)BLOCKS - 1 - i);
            tile_ptr.push_back(i), column_tile_ptr.push_back(i), tile.push_back(0),
                column_tile.push_back(0);
            ptr.push_back((int64_t)idx.size()), column_ptr.push_back((int64_t)column_idx.size());
            start.push_back(i * (int32_t)BLOCK), length.push_back((int32_t)BLOCK);
        }
        std::vector<uint8_t> mask(BLOCK * BLOCK);
        for (int64_t q = 0; q < BLOCK; q++)
            for (int64_t k = 0; k <= q; k++) mask[q * BLOCK + k] = 1;
        bits.resize(BLOCK), column_bits.resize(BLOCK), rank.resize(column_idx.size());
        s2_pack_tiles(mask.data(), 1, BLOCK, 0, bits.data());
        s2_pack_tiles(mask.data(), 1, BLOCK, 1, column_bits.data());
        index = {BLOCK, 1, BLOCKS, BLOCKS, ptr.data(), full.data(), tile_ptr.data(), idx.data(),
            tile.data(), start.data(), length.data(), start.data(), length.data(), bits.data(),
            order.data()};
        columns = {column_ptr.data(), column_full.data(), column_tile_ptr.data(), column_idx.data(),
            column_tile.data(), column_bits.data(), rank.data()};
        s2_rank_entries(&index, &columns, rank.data());
    }
};

Tensor tensor(std::vector<float>& x) {
    return {x.data(), Float32, {LENGTH * HEADS * WIDTH, HEADS * WIDTH, WIDTH, 1}};
}

// out, lse, dq, dk and dv, one after another.
std::vector<float> run(const Lists& lists, int64_t threads) {
    const int64_t size = LENGTH * HEADS * WIDTH;
    std::vector<float> q(size), k(size), v(size), out(size), lse(HEADS * LENGTH), dq(size),
        dk(size), dv(size);
    for (int64_t i = 0; i < size; i++)
        q[i] = (float)(i * 37 % 101) / 50 - 1, k[i] = (float)(i * 53 % 97) / 50 - 1,
        v[i] = (float)(i % 89) / 50 - 1;
    const Attention call{&lists.index, tensor(q), tensor(k), tensor(v), tensor(out), lse.data(),
        nullptr, 0.25, 0, 1, HEADS, HEADS, LENGTH, LENGTH, WIDTH, WIDTH, threads};
    const Gradients gradients{
        &lists.columns, tensor(v), nullptr, dq.data(), tensor(dk), tensor(dv)};
    s2_forward(&call);
    s2_backward(&call, &gradients);
    for (const auto* x : {&lse, &dq, &dk, &dv}) out.insert(out.end(), x->begin(), x->end());
    return out;
}

int main() {
    const Lists lists;
    const std::vector<float> expected = run(lists, 1);
    bool same = true;
    const auto repeat = [&](bool* right) {
        for (int i = 0; i < 20; i++) {
            const std::vector<float> got = run(lists, 2 + i % 3);
            *right = *right && std::memcmp(got.data(), expected.data(), got.size() * 4) == 0;
        }
    };
    bool other = true;
    std::thread second(repeat, &other);
    repeat(&same);
    second.join();
    std::puts(same && other ? "ok" : "bits differ");
    return same && other ? 0 : 1;
}
