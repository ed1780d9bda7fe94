// bfloat16 products by AMX tiles or by AVX-512-BF16; on other processors nothing here is called.
#include "bf16.h"

#include <algorithm>
#include <cstring>

#include "vec.h"

#if defined(__AMX_BF16__) && defined(__AVX512BF16__) && defined(__linux__)
#define S2_AMX
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace s2 {
namespace {

inline uint32_t pair(uint16_t first, uint16_t second) { return first | (uint32_t)second << 16; }

inline uint16_t number(const Matrix& x, int64_t r, int64_t c) {
    return static_cast<const uint16_t*>(x.data)[r * x.row + c * x.column];
}

#if defined(S2_AMX)
struct alignas(64) TileConfig {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};  // of a row of each tile
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// M x N tiles of 16 x 16 sums stay in tile registers while k runs; the first factor of A is
// row-major.
template <int M, int N, bool add>
void amx_block(int64_t words, const uint32_t* a, const uint32_t* b, float* c) {
    if (add) {
        _tile_loadd(0, (c), (LANES * 4));
        if (N > 1) _tile_loadd(1, (c + 16), (LANES * 4));
        if (M > 1) _tile_loadd(2, (c + 16 * LANES), (LANES * 4));
        if (M > 1 && N > 1) _tile_loadd(3, (c + 16 * LANES + 16), (LANES * 4));
    } else {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
    }
    for (int64_t k = 0; k < words; k += 16) {
        _tile_loadd(4, (a + k), (words * 4));
        _tile_loadd(6, (b + k * LANES), (LANES * 4));
        _tile_dpbf16ps(0, 4, 6);
        if (N > 1) {
            _tile_loadd(7, (b + k * LANES + 16), (LANES * 4));
            _tile_dpbf16ps(1, 4, 7);
        }
        if (M > 1) {
            _tile_loadd(5, (a + 16 * words + k), (words * 4));
            _tile_dpbf16ps(2, 5, 6);
            if (N > 1) _tile_dpbf16ps(3, 5, 7);
        }
    }
    _tile_stored(0, (c), (LANES * 4));
    if (N > 1) _tile_stored(1, (c + 16), (LANES * 4));
    if (M > 1) _tile_stored(2, (c + 16 * LANES), (LANES * 4));
    if (M > 1 && N > 1) _tile_stored(3, (c + 16 * LANES + 16), (LANES * 4));
}

template <bool add>
void amx(int64_t m, int64_t n, int64_t words, const uint32_t* a, const uint32_t* b, float* c) {
    asm volatile("" ::: "memory");  // the compiler does not know that tiles read and write memory
    for (int64_t i = 0; i < m; i += 32)
        for (int64_t j = 0; j < n; j += 32) {
            const bool tall = m - i > 16, wide = n - j > 16;
            const auto block = tall ? (wide ? amx_block<2, 2, add> : amx_block<2, 1, add>)
                                    : (wide ? amx_block<1, 2, add> : amx_block<1, 1, add>);
            block(words, a + i * words, b + j, c + i * LANES + j);
        }
    asm volatile("" ::: "memory");
}
#elif defined(__AVX512BF16__)
// Rows of A are `row` words apart, its pairs `step`; 4 rows of 4 vectors at a time.
template <bool add>
void dot_pairs(int64_t m, int64_t n, int64_t words, const uint32_t* a, int64_t row, int64_t step,
    const uint32_t* b, float* c, const float* factor) {
    for (int64_t i = 0; i < m; i += 4)
        for (int64_t j = 0; j < n; j += 2 * W) {
            const int64_t rows = std::min<int64_t>(4, m - i),
                          vectors = std::min<int64_t>(2, (n - j) / W);
            __m512 sum[4][2] = {};
            for (int64_t r = 0; add && r < rows; r++)
                for (int64_t v = 0; v < vectors; v++) {
                    const int64_t lane = j + v * W;
                    sum[r][v] = (__m512)(load(c + (i + r) * LANES + lane) * load(factor + lane));
                }
            for (int64_t k = 0; k < words; k++)
                for (int64_t r = 0; r < rows; r++) {
                    const __m512i x = _mm512_set1_epi32((int)a[(i + r) * row + k * step]);
                    for (int64_t v = 0; v < vectors; v++) {
                        const __m512i y = _mm512_loadu_si512(b + k * LANES + j + v * W);
                        sum[r][v] = _mm512_dpbf16_ps(sum[r][v], (__m512bh)x, (__m512bh)y);
                    }
                }
            for (int64_t r = 0; r < rows; r++)
                for (int64_t v = 0; v < vectors; v++)
                    store(c + (i + r) * LANES + j + v * W, (V)sum[r][v]);
        }
}
#endif

}  // namespace

bool bf16_products() {
#if defined(S2_AMX)
    static const bool permitted = syscall(SYS_arch_prctl, 0x1023, 18) == 0;  // ARCH_REQ_XCOMP_PERM
    return permitted;
#elif defined(__AVX512BF16__)
    return true;
#else
    return false;
#endif
}

Bf16Scope::Bf16Scope(bool used) : used(used) {
#if defined(S2_AMX)
    static constexpr TileConfig CONFIG;  // in memory: the compiler sees only its first bytes read
    if (used) _tile_loadconfig(&CONFIG);
#endif
}

Bf16Scope::~Bf16Scope() {
#if defined(S2_AMX)
    if (used) _tile_release();
#endif
}

void pack_rows(uint32_t* to, int64_t words, Matrix from, int64_t rows, int64_t columns) {
    for (int64_t r = 0; r < rows; r++, to += words) {
        std::fill(to + columns / 2, to + words, 0u);
        if (from.column == 1) {
            std::memcpy(to, static_cast<const uint16_t*>(from.data) + r * from.row, columns * 2);
        } else {
            for (int64_t c = 0; c + 1 < columns; c += 2)
                to[c / 2] = pair(number(from, r, c), number(from, r, c + 1));
            if (columns % 2) to[columns / 2] = number(from, r, columns - 1);
        }
    }
    std::fill(to, to + (round_up(rows, 16) - rows) * words, 0u);
}

void pack_columns(
    uint32_t* to, int64_t ld, int64_t words, Matrix from, int64_t rows, int64_t columns) {
    for (int64_t w = 0; w < words; w++)
        for (int64_t r = 0; r < rows; r++) {
            const uint16_t first = 2 * w < columns ? number(from, r, 2 * w) : 0;
            to[w * ld + r] = pair(first, 2 * w + 1 < columns ? number(from, r, 2 * w + 1) : 0);
        }
}

void pack_turned(uint32_t* to, int64_t words, Matrix from, int64_t rows, int64_t columns) {
    constexpr int64_t SIDE = 16;
    alignas(64) uint32_t part[SIDE][SIDE];  // [pairs of rows, columns]
    for (int64_t c = 0; c < columns; c += SIDE)
        for (int64_t w = 0; w < words; w += SIDE) {
            const int64_t width = std::min(SIDE, columns - c);
            std::memset(part, 0, sizeof part);
            for (int64_t i = 0; i < SIDE; i++) {
                const int64_t r = 2 * (w + i);
                for (int64_t j = 0; r < rows && j < width; j++) part[i][j] = number(from, r, c + j);
                for (int64_t j = 0; r + 1 < rows && j < width; j++)
                    part[i][j] |= (uint32_t)number(from, r + 1, c + j) << 16;
            }
            turn_square(reinterpret_cast<float*>(to + c * words + w), words,
                reinterpret_cast<const float*>(part), SIDE);
        }
}

void pack_floats(uint32_t* to, int64_t words, const float* from, int64_t rows, int64_t lanes) {
#if defined(__AVX512BF16__)
    const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9,
        24, 8, 23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    for (int64_t w = 0; w < words; w++)
        for (int64_t j = 0; j < lanes; j += W) {
            const float* at = from + 2 * w * LANES + j;
            const V first = 2 * w < rows ? load(at) : V{},
                    second = 2 * w + 1 < rows ? load(at + LANES) : V{};
            const __m512i both = (__m512i)_mm512_cvtne2ps_pbh((__m512)second, (__m512)first);
            _mm512_storeu_si512(
                to + w * LANES + j, _mm512_maskz_permutexvar_epi16(~0u, order, both));
        }
#else
    (void)to, (void)words, (void)from, (void)rows, (void)lanes;
#endif
}

void bf16_product(
    int64_t m, int64_t n, int64_t words, const uint32_t* a, const uint32_t* b, float* c) {
#if defined(S2_AMX)
    amx<false>(m, n, words, a, b, c);
#elif defined(__AVX512BF16__)
    dot_pairs<false>(m, n, words, a, words, 1, b, c, nullptr);
#else
    (void)m, (void)n, (void)words, (void)a, (void)b, (void)c;
#endif
}

void bf16_scale(int64_t m, int64_t n, int64_t words, const uint32_t* a, const uint32_t* b, float* c,
    const float* factor) {
#if defined(S2_AMX)
    for (int64_t i = 0; i < m; i++)
        for (int64_t j = 0; j < n; j += W)
            store(c + i * LANES + j, load(c + i * LANES + j) * load(factor + j));
    amx<true>(m, n, words, a, b, c);
#elif defined(__AVX512BF16__)
    dot_pairs<true>(m, n, words, a, words, 1, b, c, factor);
#else
    (void)m, (void)n, (void)words, (void)a, (void)b, (void)c, (void)factor;
#endif
}

}  // namespace s2
