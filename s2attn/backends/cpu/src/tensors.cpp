// Conversions between strided tensors and float32 matrices.
#include "tensors.h"

#include "vec.h"

namespace s2 {
namespace {

struct Float {
    typedef float type;
    static float load(float x) { return x; }
    static float store(float x) { return x; }
};
struct Brain {
    typedef uint16_t type;
    static float load(uint16_t x) { return bf16_to_float(x); }
    static uint16_t store(float x) { return float_to_bf16(x); }
};
struct Half {
    typedef uint16_t type;
    static float load(uint16_t x) { return half_to_float(x); }
    static uint16_t store(float x) { return float_to_half(x); }
};

// Calls `f` with the dtype's conversions.
template <typename F>
void by_dtype(int64_t dtype, F&& f) {
    if (dtype == Float32) f(Float());
    else if (dtype == BFloat16) f(Brain());
    else f(Half());
}

constexpr int64_t STEP = 16;  // rows and columns that are turned together

void turn(float* to, int64_t ld_to, const float* from, int64_t ld, int64_t rows, int64_t columns) {
    if (rows == STEP && columns == STEP) return turn_square(to, ld_to, from, ld);
    for (int64_t c = 0; c < columns; c++)
        for (int64_t r = 0; r < rows; r++) to[c * ld_to + r] = from[r * ld + c];
}

}  // namespace

void turn_square(float* to, int64_t ld_to, const float* from, int64_t ld) {
#if defined(__AVX512F__)
    __m512 r[16], t[16];
    for (int i = 0; i < 16; i++) r[i] = _mm512_loadu_ps(from + i * ld);
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_maskz_unpacklo_ps(0xffff, r[i], r[i + 1]);
        t[i + 1] = _mm512_maskz_unpackhi_ps(0xffff, r[i], r[i + 1]);
    }
    const auto low = [](__m512 a, __m512 b) {
        return _mm512_castpd_ps(
            _mm512_maskz_unpacklo_pd(0xff, _mm512_castps_pd(a), _mm512_castps_pd(b)));
    };
    const auto high = [](__m512 a, __m512 b) {
        return _mm512_castpd_ps(
            _mm512_maskz_unpackhi_pd(0xff, _mm512_castps_pd(a), _mm512_castps_pd(b)));
    };
    for (int i = 0; i < 16; i += 4)  // r[i + j] holds columns j, j + 4, ... of rows i to i + 3
        for (int j = 0; j < 2; j++) {
            r[i + 2 * j] = low(t[i + j], t[i + j + 2]);
            r[i + 2 * j + 1] = high(t[i + j], t[i + j + 2]);
        }
    for (int j = 0; j < 4; j++) {  // quarters of 4 rows become columns of 8, then of 16
        const __m512 a = _mm512_maskz_shuffle_f32x4(0xffff, r[j], r[4 + j], 0x88);
        const __m512 b = _mm512_maskz_shuffle_f32x4(0xffff, r[j], r[4 + j], 0xdd);
        const __m512 c = _mm512_maskz_shuffle_f32x4(0xffff, r[8 + j], r[12 + j], 0x88);
        const __m512 d = _mm512_maskz_shuffle_f32x4(0xffff, r[8 + j], r[12 + j], 0xdd);
        _mm512_storeu_ps(to + j * ld_to, _mm512_maskz_shuffle_f32x4(0xffff, a, c, 0x88));
        _mm512_storeu_ps(to + (4 + j) * ld_to, _mm512_maskz_shuffle_f32x4(0xffff, b, d, 0x88));
        _mm512_storeu_ps(to + (8 + j) * ld_to, _mm512_maskz_shuffle_f32x4(0xffff, a, c, 0xdd));
        _mm512_storeu_ps(to + (12 + j) * ld_to, _mm512_maskz_shuffle_f32x4(0xffff, b, d, 0xdd));
    }
#else
    for (int64_t c = 0; c < STEP; c++)
        for (int64_t r = 0; r < STEP; r++) to[c * ld_to + r] = from[r * ld + c];
#endif
}

void load_rows(float* to, int64_t ld, Matrix from, int64_t rows, int64_t columns, float factor) {
    by_dtype(from.dtype, [&](auto kind) {
        typedef typename decltype(kind)::type T;
        for (int64_t r = 0; r < rows; r++) {
            const T* row = static_cast<const T*>(from.data) + r * from.row;
            float* __restrict out = to + r * ld;
            if (from.column == 1)
                for (int64_t c = 0; c < columns; c++) out[c] = kind.load(row[c]) * factor;
            else
                for (int64_t c = 0; c < columns; c++)
                    out[c] = kind.load(row[c * from.column]) * factor;
        }
    });
}

void load_columns(float* to, int64_t ld, Matrix from, int64_t rows, int64_t columns, float factor) {
    alignas(64) float part[STEP][STEP];
    for (int64_t r = 0; r < rows; r += STEP)
        for (int64_t c = 0; c < columns; c += STEP) {
            const int64_t height = rows - r < STEP ? rows - r : STEP,
                          width = columns - c < STEP ? columns - c : STEP;
            const int64_t offset = (r * from.row + c * from.column) * element_size(from.dtype);
            load_rows(part[0], STEP,
                {static_cast<const char*>(from.data) + offset, from.dtype, from.row, from.column},
                height, width, factor);
            turn(to + c * ld + r, ld, part[0], STEP, height, width);
        }
}

void store_rows(Matrix to, const float* from, int64_t ld, int64_t rows, int64_t columns) {
    by_dtype(to.dtype, [&](auto kind) {
        typedef typename decltype(kind)::type T;
        for (int64_t r = 0; r < rows; r++) {
            T* __restrict row = static_cast<T*>(const_cast<void*>(to.data)) + r * to.row;
            if (to.column == 1)
                for (int64_t c = 0; c < columns; c++) row[c] = kind.store(from[r * ld + c]);
            else
                for (int64_t c = 0; c < columns; c++)
                    row[c * to.column] = kind.store(from[r * ld + c]);
        }
    });
}

void store_columns(
    Matrix to, const float* from, int64_t ld, int64_t rows, int64_t columns, const float* factor) {
    alignas(64) float part[STEP][STEP];
    for (int64_t r = 0; r < rows; r += STEP)
        for (int64_t c = 0; c < columns; c += STEP) {
            const int64_t height = rows - r < STEP ? rows - r : STEP,
                          width = columns - c < STEP ? columns - c : STEP;
            turn(part[0], STEP, from + c * ld + r, ld, width, height);
            for (int64_t i = 0; i < height; i++)
                for (int64_t j = 0; j < width; j++) part[i][j] *= factor[r + i];
            const int64_t offset = (r * to.row + c * to.column) * element_size(to.dtype);
            store_rows({static_cast<const char*>(to.data) + offset, to.dtype, to.row, to.column},
                part[0], STEP, height, width);
        }
}

}  // namespace s2
