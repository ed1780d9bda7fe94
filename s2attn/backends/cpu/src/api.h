// The C interface: records of pointers, strides and sizes, which `s2attn/backends/cpu/library.py`
// mirrors field by field.
#pragma once
#include <cstdint>

#define S2_API extern "C" __attribute__((visibility("default")))

namespace s2 {

enum Dtype : int64_t { Float32 = 0, BFloat16 = 1, Float16 = 2 };

// A tensor of four axes: (batch, token, head, width), or (page, token, head, width). Strides count
// elements.
struct Tensor {
    void* data;
    int64_t dtype;
    int64_t stride[4];
};

// A `Layout`. Tensors are contiguous; the names are those of `BlockIndex` and `Spans`.
struct Index {
    int64_t block;            // tokens per block
    int64_t heads;            // layout heads; head h * heads / num_heads serves query head h
    int64_t q_blocks;         // query blocks, the lines of the rows
    int64_t k_blocks;         // key blocks
    const int64_t* ptr;       // (heads, q_blocks + 1)
    const int32_t* full;      // (heads, q_blocks)
    const int64_t* tile_ptr;  // (heads, q_blocks)
    const int32_t* idx;
    const int32_t* tile;
    const int32_t*
        q_start;  // (q_blocks,) first token and tokens of each query block, and of each key block
    const int32_t* q_length;
    const int32_t* k_start;
    const int32_t* k_length;
    const uint64_t* bits;  // (tiles, block, words) mask tiles, bit q of row k set where query q
                           // sees key k; 64 queries per word
    const int32_t*
        order;  // (heads * q_blocks,) numbers head * q_blocks + line, the longest lists first
};

// The same entries by key block: `Layout.columns`.
struct Columns {
    const int64_t* ptr;       // (heads, k_blocks + 1)
    const int32_t* full;      // (heads, k_blocks)
    const int64_t* tile_ptr;  // (heads, k_blocks)
    const int32_t* idx;
    const int32_t* tile;
    const uint64_t* bits;  // as `Index::bits` the other way around: bit k of row q
    const int32_t* rank;   // for each entry, the earlier key blocks that its query block lists
};

// One call of attention. lse is contiguous, (batch, heads, seqlen_q).
struct Attention {
    const Index* index;
    Tensor q, k, v, out;
    float* lse;
    const float* sinks;  // (heads,) or null
    double scale;
    double softcap;  // 0 for none
    int64_t batch, heads, kv_heads, seqlen_q, seqlen_k, width, v_width;
    int64_t threads;
};

// Its gradients.
struct Gradients {
    const Columns* columns;
    Tensor dout;
    const float* dlse;  // (batch, heads, seqlen_q) or null
    float* dq;          // (batch, seqlen_q, heads, width), which is 0
    Tensor dk, dv;
};

inline int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// 64-bit words that hold one bit per token of a block.
inline int64_t words_of(int64_t block) { return (block + 63) / 64; }

}  // namespace s2

// The instruction set that this library was compiled for.
S2_API const char* s2_isa();

// Bytes of Tensor, Index, Columns, Attention, Gradients and Mass, by number.
S2_API int64_t s2_record_size(int64_t number);

// Mask tiles (count, block, block) of bytes [query, key] as `Index::bits`, or as `Columns::bits`.
S2_API void s2_pack_tiles(
    const uint8_t* tiles, int64_t count, int64_t block, int64_t by_query, uint64_t* bits);

// Fills `columns->rank`.
S2_API int s2_rank_entries(const s2::Index* index, const s2::Columns* columns, int32_t* rank);

// out and lse. Returns 0, or 1 when memory ran out.
S2_API int s2_forward(const s2::Attention* call);

// Gradients of a call whose out and lse are there. Returns as `s2_forward`.
S2_API int s2_backward(const s2::Attention* call, const s2::Gradients* gradients);

namespace s2 {

// Block mass from strided antidiagonals: `Reduction`, and queries and keys of one call.
struct Mass {
    Tensor q, k;
    float* out;  // (batch, heads, query blocks, key blocks), which is 0
    double scale;
    double softcap;  // 0 for none
    int64_t stride, block, causal, reach;
    int64_t batch, heads, kv_heads, seqlen_q, seqlen_k, width;
    int64_t threads;
};

}  // namespace s2

// Fills `out`. Returns as `s2_forward`.
S2_API int s2_antidiagonal(const s2::Mass* call);
