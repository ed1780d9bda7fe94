// float8 e4m3fn: 1 sign, 4 exponent and 3 mantissa bits, no infinity, NaN where all bits but the
// sign are set.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

#include "vec.h"

namespace s2 {

typedef uint8_t B __attribute__((vector_size(W), aligned(1)));

// W numbers from `p`.
inline V float8_to_float(const uint8_t* p) {
    B bytes;
    std::memcpy(&bytes, p, W);
    const I x = __builtin_convertvector(bytes, I), magnitude = x & 0x7f;
    const I shifted = magnitude << 20;                    // exponent and mantissa in place
    const V normal = (V)(shifted + (120 << 23));          // biases are 127 and 7
    const V small = (V)(shifted + (121 << 23)) - 0.015625f;  // exponent 0: m / 8 * 2^-6
    V y = select(magnitude < 8, small, normal);
    y = select(magnitude == 0x7f, set1(NAN), y);
    return (V)((I)y | (x & 0x80) << 24);
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
