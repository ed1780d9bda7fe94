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

}  // namespace

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
            float* corner = to + c * ld + r;
            for (int64_t j = 0; j < width; j++)
                for (int64_t i = 0; i < height; i++) corner[j * ld + i] = part[i][j];
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
            const float* corner = from + c * ld + r;
            for (int64_t i = 0; i < height; i++)
                for (int64_t j = 0; j < width; j++) part[i][j] = corner[j * ld + i] * factor[r + i];
            const int64_t offset = (r * to.row + c * to.column) * element_size(to.dtype);
            store_rows({static_cast<const char*>(to.data) + offset, to.dtype, to.row, to.column},
                part[0], STEP, height, width);
        }
}

}  // namespace s2
