// Products of a few query rows with many keys, where reading the keys is what takes time: vectors
// run along the width, so that a key is read once for up to four rows.
#pragma once
#include <algorithm>
#include <cstring>
#include <type_traits>

#include "gemm.h"
#include "narrow.h"

namespace s2 {

constexpr int TILE = 64;  // keys of a tile, and the row stride of its scores

// Sums of the lanes of 16 vectors.
inline void lane_sums(const V* x, float* to) {
#if defined(__AVX512F__)
    __m512 quad[4];
    for (int i = 0; i < 4; i++) {
        const __m512 a = (__m512)x[4 * i], b = (__m512)x[4 * i + 1];
        const __m512 c = (__m512)x[4 * i + 2], d = (__m512)x[4 * i + 3];
        const __m512d ab = _mm512_castps_pd((__m512)((V)_mm512_maskz_unpacklo_ps(0xffff, a, b) +
                                                     (V)_mm512_maskz_unpackhi_ps(0xffff, a, b)));
        const __m512d cd = _mm512_castps_pd((__m512)((V)_mm512_maskz_unpacklo_ps(0xffff, c, d) +
                                                     (V)_mm512_maskz_unpackhi_ps(0xffff, c, d)));
        quad[i] = (__m512)((V)_mm512_castpd_ps(_mm512_maskz_unpacklo_pd(0xff, ab, cd)) +
                           (V)_mm512_castpd_ps(_mm512_maskz_unpackhi_pd(0xff, ab, cd)));
    }
    const auto halves = [](__m512 a, __m512 b) {
        return (__m512)((V)_mm512_maskz_shuffle_f32x4(0xffff, a, b, 0x44) +
                        (V)_mm512_maskz_shuffle_f32x4(0xffff, a, b, 0xee));
    };
    const __m512 low = halves(quad[0], quad[1]), high = halves(quad[2], quad[3]);
    const V sums = (V)_mm512_maskz_shuffle_f32x4(0xffff, low, high, 0x88) +
                   (V)_mm512_maskz_shuffle_f32x4(0xffff, low, high, 0xdd);
    store(to, sums);
#else
    for (int i = 0; i < 16; i++) {
        float lanes[W];
        store(lanes, x[i]);
        for (int half = W / 2; half > 0; half /= 2)
            for (int j = 0; j < half; j++) lanes[j] += lanes[j + half];
        to[i] = lanes[0];
    }
#endif
}

// s[r, k] = q[r] . k[k] for R rows and `keys` keys, a multiple of 16; `width` is one of W, and E
// what k is made of.
template <int R, typename E>
void dot_rows(const float* q, int64_t ldq, const typename E::type* k, int64_t ldk, int keys,
    int width, float* s, Ahead& ahead) {
    constexpr int N = R == 1 ? 16 : R == 2 ? 8 : 4;  // keys at a time
    for (int first = 0; first < keys; first += N) {
        ahead.fetch((N * width * (int)sizeof(*k) + 63) / 64);
        V sum[16] = {};
        const auto* row = k + first * ldk;
        for (int d = 0; d < width; d += W) {
            V x[R];
            for (int r = 0; r < R; r++) x[r] = load(q + r * ldq + d);
            for (int n = 0; n < N; n++) {
                const V y = E::load(row + n * ldk + d);
                for (int r = 0; r < R; r++) sum[r * N + n] = fma(x[r], y, sum[r * N + n]);
            }
        }
        float sums[16];
        lane_sums(sum, sums);
        for (int r = 0; r < R; r++)
            std::memcpy(s + r * TILE + first, sums + r * N, N * sizeof(float));
    }
}

// o[r] = o[r] * factor[r] + sum over k of p[r, k] v[k], for R rows and N vectors of the width.
template <int R, int N, typename E>
void weigh_columns(const float* p, int keys, const typename E::type* v, int64_t ldv, float* o,
    int64_t ldo, const float* factor, Ahead& ahead) {
    V sum[R][N];
    for (int r = 0; r < R; r++)
        for (int n = 0; n < N; n++) sum[r][n] = load(o + r * ldo + n * W) * factor[r];
    for (int k = 0; k < keys; k++) {
        ahead.fetch((N * W * (int)sizeof(*v) + 63) / 64);
        V x[N];
        for (int n = 0; n < N; n++) x[n] = E::load(v + k * ldv + n * W);
        for (int r = 0; r < R; r++) {
            const V weight = set1(p[r * TILE + k]);
            for (int n = 0; n < N; n++) sum[r][n] = fma(weight, x[n], sum[r][n]);
        }
    }
    for (int r = 0; r < R; r++)
        for (int n = 0; n < N; n++) store(o + r * ldo + n * W, sum[r][n]);
}

template <int R, typename E>
void weigh_rows(const float* p, int keys, const typename E::type* v, int64_t ldv, int width,
    float* o, int64_t ldo, const float* factor, Ahead& ahead) {
    int d = 0;
    for (; d + 4 * W <= width; d += 4 * W)
        weigh_columns<R, 4, E>(p, keys, v + d, ldv, o + d, ldo, factor, ahead);
    for (; d < width; d += W)
        weigh_columns<R, 1, E>(p, keys, v + d, ldv, o + d, ldo, factor, ahead);
}

// `function(first, rows)` for groups of at most four rows, the number as a constant.
template <typename F>
void by_four(int64_t rows, const F& function) {
    for (int64_t first = 0; first < rows; first += 4) {
        switch (std::min<int64_t>(4, rows - first)) {
            case 1:
                function(first, std::integral_constant<int, 1>{});
                break;
            case 2:
                function(first, std::integral_constant<int, 2>{});
                break;
            case 3:
                function(first, std::integral_constant<int, 3>{});
                break;
            default:
                function(first, std::integral_constant<int, 4>{});
        }
    }
}

}  // namespace s2
