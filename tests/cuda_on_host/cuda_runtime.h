// What csrc/cuda needs of CUDA, on the host: the same .cu files, compiled by a C++ compiler, run as plain code.
//
// Blocks run one after the other; the threads of a block are fibers that switch at barriers and at warp-wide calls. The
// order in which they run is chosen by CUDA_ON_HOST_ORDER (0 ascending, 1 descending, any other a shuffle), so that a
// missing barrier shows as a result that depends on it. A barrier that some thread never reaches is an error.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <mutex>
#include <random>
#include <stdexcept>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __shared__ static
#define __grid_constant__
#define __launch_bounds__(...)
#define __forceinline__ inline __attribute__((always_inline))

struct CUstream_st;
using cudaStream_t = CUstream_st*;
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidDevice = 101 };
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t error) { return error ? "invalid device" : "no error"; }
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
};
inline dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace cuda_on_host {

class Machine {
 public:
  static Machine& get() {
    static Machine machine;
    return machine;
  }

  void launch(unsigned blocks, unsigned threads, const std::function<void()>& kernel) {
    const std::lock_guard<std::mutex> guard(one_at_a_time_);
    const char* chosen = std::getenv("CUDA_ON_HOST_ORDER");
    const int order = chosen ? std::atoi(chosen) : 0;
    prepare(threads, order);
    kernel_ = &kernel;
    gridDim = {blocks, 1, 1};
    blockDim = {threads, 1, 1};
    for (unsigned i = 0; i < blocks; ++i) {
      blockIdx = {order == 1 ? blocks - 1 - i : i, 0, 0};
      run_block();
    }
  }

  // Waits for the whole block; returns the number of threads whose predicate holds.
  int barrier(bool predicate) {
    votes_ += predicate;
    fibers_[current_]->state = State::at_barrier;
    leave();
    return result_;
  }

  // The value that lane `from` of this warp gives.
  std::uint64_t exchange(std::uint64_t value, unsigned from) {
    slots_[current_] = value;
    wait_for_warp();
    const std::uint64_t result = slots_[current_ / 32 * 32 + from % 32];
    wait_for_warp();
    return result;
  }
  unsigned ballot(bool predicate) {
    slots_[current_] = predicate;
    wait_for_warp();
    unsigned result = 0;
    for (unsigned lane = 0; lane < 32; ++lane)
      result |= static_cast<unsigned>(slots_[current_ / 32 * 32 + lane]) << lane;
    wait_for_warp();
    return result;
  }
  unsigned lane() const { return current_ % 32; }

 private:
  enum class State { ready, at_barrier, at_warp, done };
  static constexpr std::size_t stack_bytes = 256 << 10;
  struct Fiber {
    ucontext_t entry{};
    jmp_buf at;
    bool started = false;
    State state = State::done;
    std::unique_ptr<char[]> stack{new char[stack_bytes]};
  };

  void prepare(unsigned threads, int order) {
    if (threads % 32) throw std::runtime_error("cuda_on_host: blocks must be whole warps.");
    while (fibers_.size() < threads) fibers_.push_back(std::make_unique<Fiber>());
    slots_.assign(threads, 0);
    order_.resize(threads);
    for (unsigned i = 0; i < threads; ++i) order_[i] = order == 1 ? threads - 1 - i : i;
    if (order > 1) std::shuffle(order_.begin(), order_.end(), std::mt19937(static_cast<unsigned>(order)));
  }

  void run_block() {
    const unsigned threads = blockDim.x;
    for (unsigned i = 0; i < threads; ++i) fibers_[i]->state = State::ready;
    votes_ = 0;
    for (;;) {
      bool ran = false;
      for (unsigned i : order_) {
        if (fibers_[i]->state != State::ready) continue;
        resume(i);
        ran = true;
      }
      bool released = false;
      unsigned done = 0, waiting = 0;
      for (unsigned i = 0; i < threads; ++i) {
        done += fibers_[i]->state == State::done;
        waiting += fibers_[i]->state == State::at_barrier;
      }
      if (done == threads) return;
      if (waiting == threads) {
        result_ = votes_;
        votes_ = 0;
        release(0, threads);
        continue;
      }
      for (unsigned warp = 0; warp < threads; warp += 32) {
        unsigned here = 0;
        for (unsigned lane = 0; lane < 32; ++lane) here += fibers_[warp + lane]->state == State::at_warp;
        if (here == 32) {
          release(warp, warp + 32);
          released = true;
        }
      }
      if (!ran && !released) {
        for (auto& fiber : fibers_) fiber->started = false;
        throw std::runtime_error("cuda_on_host: some threads wait at a barrier that others never reach.");
      }
    }
  }
  void release(unsigned from, unsigned to) {
    for (unsigned i = from; i < to; ++i) fibers_[i]->state = State::ready;
  }

  __attribute__((noinline)) void resume(unsigned thread) {
    current_ = thread;
    threadIdx = {thread, 0, 0};
    if (_setjmp(scheduler_)) return;
    Fiber& fiber = *fibers_[thread];
    if (fiber.started) _longjmp(fiber.at, 1);
    fiber.started = true;
    getcontext(&fiber.entry);
    fiber.entry.uc_stack.ss_sp = fiber.stack.get();
    fiber.entry.uc_stack.ss_size = stack_bytes;
    makecontext(&fiber.entry, &Machine::body, 0);
    setcontext(&fiber.entry);
  }
  // Back to the scheduler, until it resumes this fiber.
  __attribute__((noinline)) void leave() {
    if (!_setjmp(fibers_[current_]->at)) _longjmp(scheduler_, 1);
  }
  void wait_for_warp() {
    fibers_[current_]->state = State::at_warp;
    leave();
  }
  static void body() {
    Machine& machine = get();
    for (;;) {
      (*machine.kernel_)();
      machine.fibers_[machine.current_]->state = State::done;
      machine.leave();
    }
  }

  std::mutex one_at_a_time_;
  const std::function<void()>* kernel_ = nullptr;
  std::vector<std::unique_ptr<Fiber>> fibers_;
  std::vector<std::uint64_t> slots_;
  std::vector<unsigned> order_;
  unsigned current_ = 0;
  int votes_ = 0, result_ = 0;
  jmp_buf scheduler_;
};

template <typename T>
T exchange(T value, unsigned from) {
  std::uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  bits = Machine::get().exchange(bits, from);
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

}  // namespace cuda_on_host

inline void __syncthreads() { cuda_on_host::Machine::get().barrier(false); }
inline int __syncthreads_count(int predicate) { return cuda_on_host::Machine::get().barrier(predicate != 0); }
inline int __syncthreads_or(int predicate) { return cuda_on_host::Machine::get().barrier(predicate != 0) > 0; }
template <typename T>
T __shfl_xor_sync(unsigned, T value, int lanes) {
  return cuda_on_host::exchange(value, cuda_on_host::Machine::get().lane() ^ static_cast<unsigned>(lanes));
}
template <typename T>
T __shfl_sync(unsigned, T value, int lane) {
  return cuda_on_host::exchange(value, static_cast<unsigned>(lane));
}
inline void __syncwarp() { cuda_on_host::Machine::get().ballot(false); }
inline unsigned __ballot_sync(unsigned, int predicate) { return cuda_on_host::Machine::get().ballot(predicate != 0); }
inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
template <typename T>
T atomicAdd(T* address, T value) {
  const T before = *address;
  *address += value;
  return before;
}
