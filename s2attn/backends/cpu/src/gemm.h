// Products of small matrices that lie in the caches: the inner loops of everything.
#pragma once
#include <cstdint>

namespace s2 {

// All matrices are float32. B and C are row-major with row strides `ldb` and `ldc`, n is a multiple
// of W. Sums run over k in ascending order, whatever the shape, so a number does not depend on its
// neighbours.

// C[m, n] = A[m, k] B[k, n] with A row-major.
void gemm_nn(int m, int n, int k, const float* a, int64_t lda, const float* b, int64_t ldb,
    float* c, int64_t ldc);

// C[m, n] += A[m, k] B[k, n] with A row-major.
void gemm_nn_add(int m, int n, int k, const float* a, int64_t lda, const float* b, int64_t ldb,
    float* c, int64_t ldc);

// C[m, n] += A[k, m]^T B[k, n] with A row-major.
void gemm_tn_add(int m, int n, int k, const float* a, int64_t lda, const float* b, int64_t ldb,
    float* c, int64_t ldc);

// C[m, n] = C[m, n] * factor[n] + A[k, m]^T B[k, n] with A row-major.
void gemm_tn_scale(int m, int n, int k, const float* a, int64_t lda, const float* b, int64_t ldb,
    float* c, int64_t ldc, const float* factor);

}  // namespace s2
