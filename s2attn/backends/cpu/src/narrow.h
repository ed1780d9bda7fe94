// Vectors of float32 from numbers of 8 and 16 bits.
//
// float8 is e4m3fn: 1 sign, 4 exponent and 3 mantissa bits, no infinity, NaN where all bits but the
// sign are set.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

#include "paged.h"
#include "vec.h"

namespace s2 {

typedef uint8_t U8 __attribute__((vector_size(W)));
typedef uint16_t U16 __attribute__((vector_size(2 * W)));

inline V float8_to_float(U8 bytes) {
    const I x = __builtin_convertvector(bytes, I), magnitude = x & 0x7f;
    const I shifted = magnitude << 20;                       // exponent and mantissa in place
    const V normal = (V)(shifted + (120 << 23));             // biases are 127 and 7
    const V small = (V)(shifted + (121 << 23)) - 0.015625f;  // exponent 0: m / 8 * 2^-6
    V y = select(magnitude < 8, small, normal);
    y = select(magnitude == 0x7f, set1(NAN), y);
    return (V)((I)y | (x & 0x80) << 24);
}

// What a dtype is made of, and how W neighbours are read.
struct OfFloat32 {
    typedef float type;
    static V load(const type* p) { return s2::load(p); }
};
struct OfBFloat16 {
    typedef uint16_t type;
    static V load(const type* p) {
        U16 x;
        std::memcpy(&x, p, sizeof x);
        return (V)(__builtin_convertvector(x, I) << 16);
    }
};
struct OfFloat16 {
    typedef uint16_t type;
    static V load(const type* p) {
#if defined(__AVX512F__)
        __m256i x;
        std::memcpy(&x, p, sizeof x);
        return (V)_mm512_maskz_cvtph_ps(0xffff, x);
#else
        V y{};
        for (int i = 0; i < W; i++) y[i] = half_to_float(p[i]);
        return y;
#endif
    }
};
struct OfFloat8 {
    typedef uint8_t type;
    static V load(const type* p) {
        U8 x;
        std::memcpy(&x, p, sizeof x);
        return float8_to_float(x);
    }
};

// Calls `f` with what the dtype is made of.
template <typename F>
void by_element(int64_t dtype, const F& f) {
    if (dtype == Float32) f(OfFloat32());
    else if (dtype == BFloat16) f(OfBFloat16());
    else if (dtype == Float16) f(OfFloat16());
    else f(OfFloat8());
}

// Rounds to nearest, ties to even; numbers beyond 448 become 448, NaN stays.
inline uint8_t float_to_float8(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    const uint32_t sign = bits >> 24 & 0x80, a = bits & 0x7fffffff;
    if (a > 0x7f800000) return (uint8_t)(sign | 0x7f);
    float y;
    std::memcpy(&y, &a, 4);
    if (y >= 448.0f) return (uint8_t)(sign | 0x7e);
    if (y < 0.015625f) return (uint8_t)(sign | (uint32_t)std::nearbyint(y * 512.0f));
    return (uint8_t)(sign | ((a + 0x7ffff + (a >> 20 & 1) - (120u << 23)) >> 20));
}

}  // namespace s2
