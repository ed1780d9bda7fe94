// Attention over pages of a cache, and writing into them: `s2attn/backends/cpu/paged.py` mirrors
// these records field by field.
#pragma once
#include "api.h"

namespace s2 {

enum PageDtype : int64_t { Float8 = 3 };  // e4m3fn, besides those of `Dtype`

// Integers of 4 or 8 bytes, (sequence, head, page); strides count elements.
struct Table {
    const void* data;
    int64_t bytes;
    int64_t stride[3];
    int64_t entries;  // pages of a sequence that the table has room for

    int64_t at(int64_t i, int64_t j, int64_t k) const {
        const int64_t offset = i * stride[0] + j * stride[1] + k * stride[2];
        return bytes == 4 ? static_cast<const int32_t*>(data)[offset]
                          : static_cast<const int64_t*>(data)[offset];
    }
};

// One call. out is contiguous, (total, heads, v_width), and so is lse, (heads, total); rows that
// see nothing are filled already. No number of the tables and lengths is trusted: what makes no
// sense is clamped, and keys in pages that are not there are unseen.
struct Decode {
    // The layout: rows are positions of any sequence, or with `packed` the query blocks of those of
    // the call.
    int64_t block, layout_heads, lines, k_blocks, packed;
    const int64_t* ptr;       // (layout_heads, lines + 1)
    const int32_t* full;      // (layout_heads, lines)
    const int64_t* tile_ptr;  // (layout_heads, lines)
    const int32_t* idx;
    const int32_t* tile;
    const uint64_t* bits;    // (tiles, block, words) bit k of row q
    const int32_t* q_start;  // (lines,) each, of a packed layout
    const int32_t* q_length;
    const int32_t* q_sequence;
    const int32_t* k_position;  // (k_blocks,)

    Tensor q;     // (1, total, heads, width)
    Tensor k, v;  // (pages, page_size, kv_heads, width); dtype may be `Float8`
    Table table;
    const int64_t* lengths;  // (sequences,) tokens
    const int64_t* cu_q;     // (sequences + 1,) or null: all have the same number of queries
    const float* k_scale;    // (kv_heads,) or null
    const float* v_scale;
    void* out;  // of q's dtype
    float* lse;
    const float* sinks;  // (heads,) or null
    double scale, softcap;
    int64_t sequences, total, heads, kv_heads, pages, page_size, width, v_width, threads;
};

// Rows (tokens, kv_heads, width) that are written into slots of pages.
struct Store {
    Tensor from, pages;  // from: stride[0] is not used
    const void* slots;   // (tokens,) contiguous integers of `slot_bytes` bytes
    int64_t slot_bytes;
    const float* scale;  // (kv_heads,) or null: what numbers are divided by
    int64_t tokens, kv_heads, width, num_pages, page_size, threads;
};

}  // namespace s2

// Returns 0, or 1 when memory ran out.
S2_API int s2_decode(const s2::Decode* call);
S2_API int s2_store(const s2::Store* call);
