#include "parallel.hpp"

#include <atomic>
#include <exception>
#include <mutex>
#include <thread>
#include <vector>

#if defined(__unix__) || defined(__APPLE__)
#include <dlfcn.h>
#endif
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace discedit {
namespace {

// Gradual underflow for as long as it lives: torch.set_flush_denormal must not change a moment.
class FullRange {
 public:
#if defined(__x86_64__)
  FullRange() : saved_(_mm_getcsr()) { _mm_setcsr(saved_ & ~flush); }
  ~FullRange() { _mm_setcsr(saved_); }

 private:
  static constexpr unsigned flush = 0x8040;  // flush to zero, denormals are zero
  unsigned saved_;
#elif defined(__aarch64__)
  FullRange() {
    asm volatile("mrs %0, fpcr" : "=r"(saved_));
    asm volatile("msr fpcr, %0" ::"r"(saved_ & ~flush));
  }
  ~FullRange() { asm volatile("msr fpcr, %0" ::"r"(saved_)); }

 private:
  static constexpr std::uint64_t flush = (1u << 24) | (1u << 19);  // FZ, FZ16
  std::uint64_t saved_;
#endif
};

class Job {
 public:
  Job(std::int64_t items, std::int64_t chunk, void (*run)(const void*, std::int64_t, std::int64_t), const void* context)
      : items_(items), chunk_(chunk), run_(run), context_(context) {}

  // Takes chunks until there are none left. Any number of threads may work at once.
  static void work(void* job) noexcept { static_cast<Job*>(job)->take_chunks(); }

  void finish() const {
    if (failure_) std::rethrow_exception(failure_);
  }

 private:
  void take_chunks() noexcept {
    [[maybe_unused]] const FullRange mode;
    for (;;) {
      const std::int64_t begin = next_.fetch_add(chunk_, std::memory_order_relaxed);
      if (begin >= items_) return;
      try {
        run_(context_, begin, std::min(begin + chunk_, items_));
      } catch (...) {
        const std::lock_guard<std::mutex> lock(mutex_);
        if (!failure_) failure_ = std::current_exception();
      }
    }
  }

  const std::int64_t items_, chunk_;
  void (*const run_)(const void*, std::int64_t, std::int64_t);
  const void* const context_;
  std::atomic<std::int64_t> next_{0};
  std::mutex mutex_;
  std::exception_ptr failure_;
};

// libgomp's entry for a parallel region, as its ABI fixes it; LLVM's runtime on Linux has it too.
using ParallelRegion = void (*)(void (*)(void*), void*, unsigned threads, unsigned flags);

ParallelRegion openmp_in_process() {
#if defined(__unix__) || defined(__APPLE__)
  static std::atomic<ParallelRegion> found{nullptr};
  ParallelRegion region = found.load(std::memory_order_relaxed);
  if (!region) {  // looked for again until it is there: torch may be imported later
    region = reinterpret_cast<ParallelRegion>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
    found.store(region, std::memory_order_relaxed);
  }
  return region;
#else
  return nullptr;
#endif
}

void on_own_threads(Job& job, int threads) {
  std::vector<std::thread> workers;
  workers.reserve(static_cast<std::size_t>(threads - 1));
  try {
    while (static_cast<int>(workers.size()) + 1 < threads) workers.emplace_back(&Job::work, &job);
  } catch (...) {  // no more threads to be had: those there are do it all
  }
  Job::work(&job);
  for (std::thread& worker : workers) worker.join();
}

}  // namespace

void run_parallel(std::int64_t items, std::int64_t chunk, int threads,
                  void (*run)(const void*, std::int64_t, std::int64_t), const void* context) {
  if (items <= 0) return;
  Job job(items, chunk, run, context);
  if (threads <= 1 || items <= chunk) {
    Job::work(&job);
  } else if (const ParallelRegion region = openmp_in_process()) {
    // The whole team, even for few chunks: another size would make the runtime end threads and start them again.
    region(&Job::work, &job, static_cast<unsigned>(threads), 0);
  } else {
    on_own_threads(job, static_cast<int>(std::min<std::int64_t>(threads, (items + chunk - 1) / chunk)));
  }
  job.finish();
}

}  // namespace discedit
