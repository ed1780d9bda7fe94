// A pool of threads that sleep between calls: one function runs over numbered items, handed out by
// a counter.
#pragma once
#include <cstdint>

namespace s2 {

// Runs `item(context, i)` for every i in [0, items), by the caller and up to `threads - 1` threads
// of the pool.
//
// Items are begun in ascending order, so an item may wait for one of a lower number. The call
// returns when all items are done; threads of the pool that were not scheduled in time are not
// waited for. Several calls may run at a time, each from its own thread. Throws std::bad_alloc when
// an item did; the items after it may then be missing.
void parallel_for(
    int64_t items, int threads, void (*item)(void* context, int64_t i), void* context);

template <typename F>
void parallel_for(int64_t items, int threads, const F& item) {
    const auto call = [](void* context, int64_t i) { (*static_cast<const F*>(context))(i); };
    parallel_for(items, threads, call, const_cast<F*>(&item));
}

// Scratch memory of this thread, aligned to 64 bytes and valid until the thread's next call of
// `scratch`; it grows and is kept.
float* scratch(int64_t floats);

// One step of waiting for another thread: `turn` counts the steps.
void wait_a_little(int turn);

}  // namespace s2
