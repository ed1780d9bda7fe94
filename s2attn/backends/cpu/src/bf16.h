// Products of bfloat16 matrices with float32 sums, where the processor has instructions for them
// that pay: AMX tiles, or AVX-512-BF16 without AMX (with AMX around, vdpbf16ps is slower than
// float32).
//
// Numbers that are summed over lie next to each other in pairs: a word holds two bfloat16.
#pragma once
#include <cstdint>

#include "tensors.h"

namespace s2 {

// Whether this process may use them. AMX needs a permission of the system, asked for once.
bool bf16_products();

// Around the products of a thread: AMX tiles are set up and given back.
struct Bf16Scope {
    explicit Bf16Scope(bool used);
    ~Bf16Scope();
    bool used;
};

// to[r, c / 2] holds from[r, c] and from[r, c + 1]; `words` words a row, the rest is 0. Rows up to
// a multiple of 16 are 0 too.
void pack_rows(uint32_t* to, int64_t words, Matrix from, int64_t rows, int64_t columns);

// to[c / 2 * ld + r] holds from[r, c] and from[r, c + 1]; `words` rows of `to`, the rest is 0.
void pack_columns(
    uint32_t* to, int64_t ld, int64_t words, Matrix from, int64_t rows, int64_t columns);

// The left operand of `bf16_add`: from[k, m] with k < rows in pairs, `words` of them.
void pack_turned(uint32_t* to, int64_t words, Matrix from, int64_t rows, int64_t columns);

// to[k / 2 * LANES + lane] holds from[k, lane] and from[k + 1, lane], rounded, for k < rows; 0
// after.
void pack_floats(uint32_t* to, int64_t words, const float* from, int64_t rows, int64_t lanes);

// C[m, n] = A[m, k] B[k, n]: A from `pack_rows`, B from `pack_columns`, strides of B and C are
// LANES. Rows of C up to a multiple of 16 are written.
void bf16_product(
    int64_t m, int64_t n, int64_t words, const uint32_t* a, const uint32_t* b, float* c);

// C[m, n] = C[m, n] * factor[n] + A[k, m]^T B[k, n]: A from `pack_turned`, B from `pack_floats`.
void bf16_scale(int64_t m, int64_t n, int64_t words, const uint32_t* a, const uint32_t* b, float* c,
    const float* factor);

}  // namespace s2
