// Parts of strided tensors of any dtype, to and from float32 matrices.
#pragma once
#include "api.h"
#include "gemm.h"

namespace s2 {

inline int64_t element_size(int64_t dtype) { return dtype == Float32 ? 4 : 2; }

// The address of element (i, j, h, 0).
inline char* at(const Tensor& x, int64_t i, int64_t j, int64_t h) {
    return static_cast<char*>(x.data) +
           (i * x.stride[0] + j * x.stride[1] + h * x.stride[2]) * element_size(x.dtype);
}

// Where a matrix of numbers of some dtype lies: `row` and `column` are strides in elements.
struct Matrix {
    const void* data;
    int64_t dtype, row, column;
};

// Tokens from j on, of entry i and head h, one row each.
inline Matrix rows_at(const Tensor& x, int64_t i, int64_t j, int64_t h) {
    return {at(x, i, j, h), x.dtype, x.stride[1], x.stride[3]};
}

// What `Ahead` fetches of `rows` rows that lie in memory one by one; scattered columns are not
// fetched.
inline Ahead fetch_rows(Matrix from, int64_t rows, int64_t columns) {
    const int64_t size = element_size(from.dtype);
    return {static_cast<const char*>(from.data), from.column == 1 ? rows : 0, from.row * size,
        columns * size};
}

// to[r * ld + c] = factor * from[r, c]
void load_rows(
    float* to, int64_t ld, Matrix from, int64_t rows, int64_t columns, float factor = 1.0f);

// to[c * ld + r] = factor * from[r, c]
void load_columns(
    float* to, int64_t ld, Matrix from, int64_t rows, int64_t columns, float factor = 1.0f);

// to[c * ld_to + r] = from[r * ld + c] for 16 rows and columns of any 4 bytes
void turn_square(float* to, int64_t ld_to, const float* from, int64_t ld);

// to[r, c] = factor[r] * from[c * ld + r], rounded to the dtype of `to`, which is written
void store_columns(
    Matrix to, const float* from, int64_t ld, int64_t rows, int64_t columns, const float* factor);

// to[r, c] = from[r * ld + c], rounded to the dtype of `to`, which is written
void store_rows(Matrix to, const float* from, int64_t ld, int64_t rows, int64_t columns);

}  // namespace s2
