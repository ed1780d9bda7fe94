// Products of small matrices that lie in the caches: the inner loops of everything.
#pragma once
#include <cstdint>

namespace s2 {

// Rows that a later product reads, brought into the L2 cache line by line while an earlier one
// runs: the hardware's own prefetchers do not follow rows that lie a stride apart.
struct Ahead {
    const char* row = nullptr;
    int64_t rows = 0, stride = 0, bytes = 0;  // rows that are left, their distance and length
    int64_t column = 0;                       // bytes of the first one that are fetched already

    void fetch(int lines) {
        for (; lines > 0 && rows > 0; lines--) {
            __builtin_prefetch(row + column, 0, 2);
            column += 64;
            if (column >= bytes) column = 0, rows--, row += stride;
        }
    }
};

// All matrices are float32. B and C are row-major with row strides `ldb` and `ldc`, n is a multiple
// of W. Sums run over k in ascending order, whatever the shape, so a number does not depend on its
// neighbours.

// C[m, n] = A[m, k] B[k, n] with A row-major.
void gemm_nn(int m, int n, int k, const float* a, int64_t lda, const float* b, int64_t ldb,
    float* c, int64_t ldc, Ahead* ahead = nullptr);

// C[m, n] += A[m, k] B[k, n] with A row-major.
void gemm_nn_add(int m, int n, int k, const float* a, int64_t lda, const float* b, int64_t ldb,
    float* c, int64_t ldc, Ahead* ahead = nullptr);

// C[m, n] += A[k, m]^T B[k, n] with A row-major.
void gemm_tn_add(int m, int n, int k, const float* a, int64_t lda, const float* b, int64_t ldb,
    float* c, int64_t ldc, Ahead* ahead = nullptr);

// C[m, n] = C[m, n] * factor[n] + A[k, m]^T B[k, n] with A row-major.
void gemm_tn_scale(int m, int n, int k, const float* a, int64_t lda, const float* b, int64_t ldb,
    float* c, int64_t ldc, const float* factor, Ahead* ahead = nullptr);

}  // namespace s2
