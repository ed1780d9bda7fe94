// What is asked of the library once: its instruction set, and mask tiles as bits.
#include <algorithm>
#include <new>
#include <vector>

#include "api.h"
#include "paged.h"

const char* s2_isa() {
#if defined(__AVX512BF16__) && defined(__AMX_BF16__) && defined(__linux__)
    return "AVX-512, AMX";
#elif defined(__AVX512BF16__)
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

int64_t s2_record_size(int64_t number) {
    const int64_t sizes[] = {sizeof(s2::Tensor), sizeof(s2::Index), sizeof(s2::Columns),
        sizeof(s2::Attention), sizeof(s2::Gradients), sizeof(s2::Mass), sizeof(s2::Table),
        sizeof(s2::Decode), sizeof(s2::Store)};
    return sizes[number];
}

void s2_pack_tiles(
    const uint8_t* tiles, int64_t count, int64_t block, int64_t by_query, uint64_t* bits) {
    const int64_t words = s2::words_of(block), square = block * block;
    const int64_t row = by_query ? block : 1, lane = by_query ? 1 : block;
    std::fill(bits, bits + count * block * words, 0);
    for (int64_t t = 0; t < count; t++, tiles += square)
        for (int64_t i = 0; i < block; i++, bits += words)
            for (int64_t j = 0; j < block; j++)
                bits[j / 64] |= (uint64_t)(tiles[i * row + j * lane] != 0) << (j % 64);
}

int s2_rank_entries(const s2::Index* index, const s2::Columns* columns, int32_t* rank) try {
    std::vector<int32_t> seen(index->q_blocks);
    for (int64_t h = 0; h < index->heads; h++) {
        const int64_t* ptr = columns->ptr + h * (index->k_blocks + 1);
        if (h > 0 && ptr[0] == ptr[-index->k_blocks - 1]) continue;  // the lists of the head before
        std::fill(seen.begin(), seen.end(), 0);
        for (int64_t e = ptr[0]; e < ptr[index->k_blocks]; e++) rank[e] = seen[columns->idx[e]]++;
    }
    return 0;
} catch (const std::bad_alloc&) {
    return 1;
}
