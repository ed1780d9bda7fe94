// Register tiles: R rows of N vectors stay in registers while k runs; every step loads N vectors of
// B and broadcasts R numbers of A.
#include "gemm.h"

#include "vec.h"

namespace s2 {
namespace {

constexpr int STEP = 8, FETCHED = 3;  // lines that are fetched ahead every so many steps of k

enum Mode { Store, Add, Scale };

struct Operands {
    int k;
    const float* a;
    int64_t lda;
    const float* b;
    int64_t ldb;
    float* c;
    int64_t ldc;
    const float* factor;
    Ahead* ahead;
};

// One register tile; A is row-major, or its transpose is when `turned`.
template <int R, int N, Mode mode, bool turned>
__attribute__((noinline)) void tile(const Operands& x) {
    V acc[R][N];  // from 0, and added to C at the end: long sums over many tiles lose less
    const int64_t ldc = x.ldc;
    float* c = x.c;
#pragma GCC unroll 16
    for (int r = 0; r < R; r++)
#pragma GCC unroll 4
        for (int j = 0; j < N; j++) acc[r][j] = V{};
    const float* a = x.a;
    const float* b = x.b;
    const int64_t row = turned ? 1 : x.lda, step = turned ? x.lda : 1, ldb = x.ldb;
    // Three rows per pointer: x86 addresses a, a + row and a + 2 * row.
    const float* rows[(R + 2) / 3];
    for (int i = 0; i < (R + 2) / 3; i++) rows[i] = a + 3 * i * row;
    for (int k = 0; k < x.k;) {
        const int stop = k + STEP < x.k ? k + STEP : x.k;
        if (x.ahead) x.ahead->fetch(FETCHED);
        for (; k < stop; k++) {
            V v[N];
#pragma GCC unroll 4
            for (int j = 0; j < N; j++) v[j] = load(b + j * W);
#pragma GCC unroll 16
            for (int r = 0; r < R; r++) {
                const V s = set1(turned ? a[r] : rows[r / 3][r % 3 * row]);
#pragma GCC unroll 4
                for (int j = 0; j < N; j++) acc[r][j] = fma(s, v[j], acc[r][j]);
            }
            b += ldb;
            if (turned) a += step;
            else
#pragma GCC unroll 8
                for (int i = 0; i < (R + 2) / 3; i++) rows[i]++;
        }
    }
#pragma GCC unroll 16
    for (int r = 0; r < R; r++)
#pragma GCC unroll 4
        for (int j = 0; j < N; j++) {
            float* at = c + r * ldc + j * W;
            if (mode == Add) acc[r][j] += load(at);
            if (mode == Scale) acc[r][j] = fma(load(at), load(x.factor + j * W), acc[r][j]);
            store(at, acc[r][j]);
        }
}

// All rows of a strip of N vectors: tiles of R rows, then of 4, 2 and 1.
template <int R, int N, Mode mode, bool turned>
void strip(int m, Operands x) {
    const int64_t row = turned ? 1 : x.lda;
    const auto advance = [&](int rows) { x.a += rows * row, x.c += rows * x.ldc, m -= rows; };
    for (; m >= R; advance(R)) tile<R, N, mode, turned>(x);
    for (; m >= 4; advance(4)) tile<4, N, mode, turned>(x);
    if (m >= 2) tile<2, N, mode, turned>(x), advance(2);
    if (m >= 1) tile<1, N, mode, turned>(x), advance(1);
}

template <Mode mode, bool turned>
void gemm(int m, int n, Operands x) {
    const auto advance = [&](int lanes) {
        x.b += lanes, x.c += lanes, x.factor += mode == Scale ? lanes : 0, n -= lanes;
    };
    for (; n >= NV * W; advance(NV * W)) strip<MR, NV, mode, turned>(m, x);
    if (NV > 2)
        for (; n >= 2 * W; advance(2 * W)) strip<2 * MR, 2, mode, turned>(m, x);
    for (; n >= W; advance(W)) strip<2 * MR, 1, mode, turned>(m, x);
}

}  // namespace

void gemm_nn(int m, int n, int k, const float* a, int64_t lda, const float* b, int64_t ldb,
    float* c, int64_t ldc, Ahead* ahead) {
    gemm<Store, false>(m, n, {k, a, lda, b, ldb, c, ldc, nullptr, ahead});
}

void gemm_nn_add(int m, int n, int k, const float* a, int64_t lda, const float* b, int64_t ldb,
    float* c, int64_t ldc, Ahead* ahead) {
    gemm<Add, false>(m, n, {k, a, lda, b, ldb, c, ldc, nullptr, ahead});
}

void gemm_tn_add(int m, int n, int k, const float* a, int64_t lda, const float* b, int64_t ldb,
    float* c, int64_t ldc, Ahead* ahead) {
    gemm<Add, true>(m, n, {k, a, lda, b, ldb, c, ldc, nullptr, ahead});
}

void gemm_tn_scale(int m, int n, int k, const float* a, int64_t lda, const float* b, int64_t ldb,
    float* c, int64_t ldc, const float* factor, Ahead* ahead) {
    gemm<Scale, true>(m, n, {k, a, lda, b, ldb, c, ldc, factor, ahead});
}

}  // namespace s2
