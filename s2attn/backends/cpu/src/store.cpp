// New keys or values on their way into the pages of a cache.
#include <cstring>
#include <new>

#include "narrow.h"
#include "pool.h"
#include "work.h"

namespace s2 {
namespace {

int64_t slot_of(const Store& call, int64_t token) {
    return call.slot_bytes == 4 ? static_cast<const int32_t*>(call.slots)[token]
                                : static_cast<const int64_t*>(call.slots)[token];
}

void store_row(const Store& call, Matrix from, char* to, int64_t head, float* row) {
    const int64_t step = call.pages.stride[3];
    if (call.pages.dtype == Float8) {
        load_rows(row, call.width, from, 1, call.width);
        for (int64_t d = 0; d < call.width; d++)
            to[d * step] = (char)float_to_float8(call.scale ? row[d] / call.scale[head] : row[d]);
        return;
    }
    const size_t size = (size_t)element_size(call.pages.dtype);
    const char* read = static_cast<const char*>(from.data);
    if (from.column == 1 && step == 1) {
        std::memcpy(to, read, (size_t)call.width * size);
        return;
    }
    for (int64_t d = 0; d < call.width; d++)
        std::memcpy(to + d * step * size, read + d * from.column * size, size);
}

// All tokens of one head in their order: of several with one slot the last is kept, for every head.
void store_head(const Store& call, int64_t head) {
    const Tensor& to = call.pages;
    const int64_t size = to.dtype == Float8 ? 1 : element_size(to.dtype);
    float* row = scratch(call.width);
    for (int64_t token = 0; token < call.tokens; token++) {
        const int64_t slot = slot_of(call, token);
        if (slot < 0 || slot / call.page_size >= call.num_pages) continue;
        const int64_t page = slot / call.page_size, offset = slot % call.page_size;
        const int64_t at = page * to.stride[0] + offset * to.stride[1] + head * to.stride[2];
        const Matrix from = rows_at(call.from, 0, token, head);
        store_row(call, from, static_cast<char*>(to.data) + at * size, head, row);
    }
}

}  // namespace
}  // namespace s2

int s2_store(const s2::Store* given) {
    const s2::Store& call = *given;
    const auto item = [&](int64_t head) { s2::store_head(call, head); };
    try {
        s2::parallel_for(call.kv_heads, (int)call.threads, item);
    } catch (const std::bad_alloc&) {
        return 1;
    }
    return 0;
}
