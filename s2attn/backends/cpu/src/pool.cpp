// The pool: workers sleep on a condition variable; a call puts a job in front of them and works on
// it itself.
//
// A forked child has none of its parent's threads: it forgets the pool and starts its own on first
// use. Workers take over the caller's floating-point environment, so that an item has the same bits
// on any thread, and block all signals, which belong to the process's own threads.
#include "pool.h"

#include <pthread.h>
#include <sched.h>
#include <signal.h>

#include <atomic>
#include <cfenv>
#include <condition_variable>
#include <cstdlib>
#include <list>
#include <mutex>
#include <new>
#include <thread>

#if defined(__x86_64__) || defined(__i386__)
#include <immintrin.h>
#endif

namespace s2 {
namespace {

struct Job {
    void (*item)(void*, int64_t);
    void* context;
    int64_t items;
    std::fenv_t environment;
    std::atomic<int64_t> next{0};
    int wanted = 0;   // workers that may still join; under the pool's mutex, as `running`
    int running = 0;  // workers that have joined and not left
    std::condition_variable left;
    std::atomic<bool> failed{false};

    void work() noexcept {
        try {
            for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < items;)
                item(context, i);
        } catch (const std::bad_alloc&) {
            failed.store(true);
            next.store(items);  // nothing more is begun
        }
    }
};

struct Pool {
    std::mutex mutex;
    std::condition_variable called;
    std::list<Job*> jobs;  // that want workers
    int workers = 0;

    void serve() {
        std::unique_lock<std::mutex> lock(mutex);
        for (;;) {
            called.wait(lock, [&] { return !jobs.empty(); });
            Job* job = jobs.front();
            job->running++;
            if (--job->wanted == 0) jobs.pop_front();
            lock.unlock();
            std::fesetenv(&job->environment);
            job->work();
            lock.lock();
            if (--job->running == 0) job->left.notify_one();
        }
    }

    // Starts threads until there are `count`, or as many as the system gives. The mutex is held.
    void grow(int count) {
        if (workers >= count) return;
        sigset_t all, before;
        sigfillset(&all);
        pthread_sigmask(SIG_SETMASK, &all, &before);
        try {
            for (; workers < count; workers++) std::thread([this] { serve(); }).detach();
        } catch (const std::exception&) {  // no more threads: those that are there, and the caller,
                                           // do the work
        }
        pthread_sigmask(SIG_SETMASK, &before, nullptr);
    }
};

std::atomic<Pool*> current{nullptr};  // never freed: its threads sleep in it until the process ends

Pool* pool() {
    Pool* here = current.load(std::memory_order_acquire);
    if (here != nullptr) return here;
    static const int registered =
        pthread_atfork(nullptr, nullptr, [] { current.store(nullptr, std::memory_order_release); });
    (void)registered;
    Pool* made = new Pool;
    if (current.compare_exchange_strong(here, made, std::memory_order_acq_rel)) return made;
    delete made;
    return here;
}

struct Scratch {
    float* data = nullptr;
    int64_t floats = 0;
    ~Scratch() { std::free(data); }
};

thread_local Scratch own;

}  // namespace

void parallel_for(int64_t items, int threads, void (*item)(void*, int64_t), void* context) {
    const int helpers = (int)(items - 1 < threads - 1 ? items - 1 : threads - 1);
    Job job;
    job.item = item, job.context = context, job.items = items, job.wanted = helpers;
    if (helpers <= 0) {
        job.work();
        if (job.failed) throw std::bad_alloc();
        return;
    }
    std::fegetenv(&job.environment);
    Pool* p = pool();
    std::unique_lock<std::mutex> lock(p->mutex);
    p->grow(helpers);
    const auto place = p->jobs.insert(p->jobs.end(), &job);
    lock.unlock();
    for (int i = 0; i < helpers; i++) p->called.notify_one();
    job.work();
    lock.lock();
    if (job.wanted > 0) p->jobs.erase(place);
    job.left.wait(lock, [&] { return job.running == 0; });
    if (job.failed) throw std::bad_alloc();
}

float* scratch(int64_t floats) {
    if (own.floats < floats) {
        std::free(own.data);
        own.floats = 0;
        const size_t bytes = ((size_t)floats * 4 + 4095) & ~(size_t)4095;
        own.data = static_cast<float*>(std::aligned_alloc(4096, bytes));
        if (own.data == nullptr) throw std::bad_alloc();
        own.floats = (int64_t)(bytes / 4);
    }
    return own.data;
}

void wait_a_little(int turn) {
    if (turn < 64) {
#if defined(__x86_64__) || defined(__i386__)
        _mm_pause();
#endif
    } else {
        sched_yield();
    }
}

}  // namespace s2
