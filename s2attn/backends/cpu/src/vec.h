// Vectors of float32 in the widest registers that the compiler may use: AVX-512, AVX2, NEON, or 128
// bits of anything.
//
// Everything is written with the compiler's vector types; only what they cannot say, or say slowly,
// is an intrinsic.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#if defined(__x86_64__) || defined(__i386__)
#include <immintrin.h>
#endif
#if defined(__ARM_NEON)
#include <arm_neon.h>
#endif

namespace s2 {

#if defined(__AVX512F__)
constexpr int W = 16;  // lanes of a vector
constexpr int NV = 4;  // vectors in a row of a register tile
constexpr int MR =
    6;  // rows of a register tile: MR * NV accumulators, NV vectors of B and one broadcast value
#elif defined(__AVX2__)
constexpr int W = 8;
constexpr int NV = 2;
constexpr int MR = 6;
#elif defined(__ARM_NEON) && defined(__aarch64__)
constexpr int W = 4;
constexpr int NV = 4;
constexpr int MR = 6;
#else
constexpr int W = 4;
constexpr int NV = 2;
constexpr int MR = 4;
#endif

constexpr int LANES = 64;  // lanes of a panel: one bit each in a mask word

typedef float V __attribute__((vector_size(4 * W)));
typedef int32_t I __attribute__((vector_size(4 * W)));
typedef float Vu __attribute__((vector_size(4 * W), aligned(4)));

inline V load(const float* p) { return *reinterpret_cast<const Vu*>(p); }
inline void store(float* p, V x) { *reinterpret_cast<Vu*>(p) = x; }
inline V set1(float x) { return x - V{}; }  // x - 0 is x, for zeros of either sign and for NaN
inline V fma(V a, V b, V c) { return a * b + c; }

// `mask` has all bits of a lane set or none.
inline V select(I mask, V yes, V no) { return (V)((mask & (I)yes) | (~mask & (I)no)); }

#if defined(__AVX512F__)
inline V pick(uint64_t bits, V yes, V no) {
    return (V)_mm512_mask_blend_ps((__mmask16)bits, (__m512)no, (__m512)yes);
}
// NaN in `x` is lost: the result is then `y`.
inline V max_or_second(V x, V y) { return (V)_mm512_maskz_max_ps(0xffff, (__m512)x, (__m512)y); }
#else
// Lane i of `yes` where bit i is set, else of `no`.
inline V pick(uint64_t bits, V yes, V no) {
    I lane;
    for (int i = 0; i < W; i++) lane[i] = 1 << i;
    return select((lane & (int32_t)bits) != 0, yes, no);
}
inline V max_or_second(V x, V y) { return select(x > y, x, y); }
#endif

// 2^x: exactly 0 below -126, NaN for NaN, at most 2^127. Relative error at most 2^-22.5: a minimax
// polynomial of degree 5 on [-1/2, 1/2] whose constant is 1, so that 2^0 is 1.
inline V exp2(V x) {
#if defined(__AVX512F__)
    const V n = (V)_mm512_maskz_roundscale_ps(0xffff, (__m512)x, 0x08);
#else
    const V magic = set1(
        12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer, which the low bits then hold
    x = select(x > 127.0f, set1(127.0f), x);
    const V shifted = x + magic;
    const V n = shifted - magic;
#endif
    const V f = x - n;
    V p = set1(0.00132647272f);
    p = fma(p, f, set1(0.00967151269f));
    p = fma(p, f, set1(0.0555073374f));
    p = fma(p, f, set1(0.240222421f));
    p = fma(p, f, set1(0.693146978f));
    p = fma(p, f, set1(1.0f));
#if defined(__AVX512F__)
    const __mmask16 normal = _mm512_cmp_ps_mask((__m512)x, _mm512_set1_ps(-126.0f), _CMP_NLT_UQ);
    return (V)_mm512_maskz_scalef_ps(normal, (__m512)p, (__m512)n);
#else
    const I exponent = (I)shifted - (I)magic;
    const V power = (V)((exponent + 127) << 23);
    return select(x < -126.0f, V{}, p * power);
#endif
}

// tanh(x) to float32 accuracy: a polynomial near 0 (Cephes), 1 - 2 / (e^(2|x|) + 1) elsewhere.
inline V tanh(V x) {
    const V a = (V)((I)x & 0x7fffffff), z = x * x;
    V p = set1(-5.70498872745e-3f);
    p = fma(p, z, set1(2.06390887954e-2f));
    p = fma(p, z, set1(-5.37397155531e-2f));
    p = fma(p, z, set1(1.33314422036e-1f));
    p = fma(p, z, set1(-3.33332819422e-1f));
    const V near = fma(p * z, x, x);
    const V capped = select(a > 40.0f, set1(40.0f), a);
    const V far = 1.0f - 2.0f / (exp2(capped * 2.885390082f) + 1.0f);
    const V signed_far = (V)((I)far | ((I)x & (int32_t)0x80000000));
    return select(a < 0.625f, near, signed_far);
}

inline float bf16_to_float(uint16_t x) {
    const uint32_t bits = (uint32_t)x << 16;
    float y;
    std::memcpy(&y, &bits, 4);
    return y;
}

inline uint16_t float_to_bf16(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    if ((bits & 0x7fffffff) > 0x7f800000) return (uint16_t)(bits >> 16 | 0x40);  // NaN stays NaN
    return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

inline float half_to_float(uint16_t x) {
#if defined(__F16C__)
    return _cvtsh_ss(x);
#elif defined(__aarch64__)
    _Float16 y;
    std::memcpy(&y, &x, 2);
    return (float)y;
#else
    const uint32_t magnitude = (uint32_t)(x & 0x7fff) << 13, special = magnitude | 0x7f800000;
    float y;
    std::memcpy(&y, &magnitude, 4);
    y *= 5.192296858534828e33f;  // 2^112, the difference of the exponents' biases: exact, below the
                                 // normal numbers too
    if ((x & 0x7c00) == 0x7c00) std::memcpy(&y, &special, 4);
    return x & 0x8000 ? -y : y;
#endif
}

inline uint16_t float_to_half(float x) {
#if defined(__F16C__)
    return _cvtss_sh(x, 0);
#elif defined(__aarch64__)
    const _Float16 half = (_Float16)x;
    uint16_t y;
    std::memcpy(&y, &half, 2);
    return y;
#else
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    const uint32_t sign = bits >> 16 & 0x8000, a = bits & 0x7fffffff;
    if (a > 0x7f800000) return (uint16_t)(sign | 0x7e00);
    if (a >= 0x477ff000) return (uint16_t)(sign | 0x7c00);  // rounds to 2^16 or more
    if (a < 0x38800000) {  // below the normal numbers: a multiple of 2^-24
        float y;
        std::memcpy(&y, &a, 4);
        return (uint16_t)(sign | (uint32_t)std::nearbyint(y * 16777216.0f));
    }
    return (uint16_t)(sign | ((a + 0xfff + (a >> 13 & 1) - 0x38000000) >> 13));
#endif
}

}  // namespace s2
