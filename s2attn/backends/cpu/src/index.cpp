// What is asked of the library once: its instruction set, and mask tiles as bits.
#include <cstring>

#include "api.h"

const char* s2_isa() {
#if defined(__AVX512F__) && defined(__AMX_BF16__)
    return "AVX-512, AMX";
#elif defined(__AVX512F__) && defined(__AVX512BF16__)
    return "AVX-512, BF16";
#elif defined(__AVX512F__)
    return "AVX-512";
#elif defined(__AVX2__) && defined(__FMA__)
    return "AVX2, FMA";
#elif defined(__ARM_NEON)
    return "NEON";
#else
    return "128-bit vectors";
#endif
}

void s2_pack_tiles(const uint8_t* tiles, int64_t count, int64_t block, uint64_t* bits) {
    const int64_t words = s2::words_of(block);
    std::memset(bits, 0, (size_t)(count * block * words) * 8);
    for (int64_t t = 0; t < count; t++)
        for (int64_t q = 0; q < block; q++) {
            const uint8_t* row = tiles + (t * block + q) * block;
            uint64_t* out = bits + t * block * words + q / 64;
            for (int64_t k = 0; k < block; k++)
                out[k * words] |= (uint64_t)(row[k] != 0) << (q % 64);
        }
}
