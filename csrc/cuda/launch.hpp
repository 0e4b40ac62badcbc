// How every kernel is launched: on a stream, without waiting for it, and with its error as an exception.
//
// Bits may differ from the CPU's by rounding: nvcc contracts products and sums into fused multiply-adds, and sums run
// over other lanes. The same batch gives the same bits again: no sum depends on the order in which blocks run.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "stream.hpp"

namespace discedit::cuda {

static_assert(std::is_same_v<Stream, cudaStream_t>, "streams pass through the bindings as they are");

constexpr unsigned whole_warp = 0xffffffffu;

inline void check(const char* op, cudaError_t error) {
  if (error != cudaSuccess) throw std::runtime_error(std::string(op) + ": CUDA: " + cudaGetErrorString(error) + ".");
}

// Runs the kernel with one block per item, or as many as a grid holds; kernels stride over the items that are left.
template <typename... Parameters, typename... Arguments>
void launch(const char* op, void (*kernel)(Parameters...), std::int64_t items, int threads, Stream stream,
            const Arguments&... arguments) {
  if (items <= 0) return;
  const auto blocks = static_cast<unsigned>(std::min<std::int64_t>(items, 0x7fffffff));
#if defined(__CUDACC__)
  kernel<<<blocks, static_cast<unsigned>(threads), 0, stream>>>(arguments...);
  check(op, cudaGetLastError());
#else
  (void)op, (void)stream;
  cuda_on_host::Machine::get().launch(blocks, static_cast<unsigned>(threads), [=] { kernel(arguments...); });
#endif
}

constexpr std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

template <typename To, typename From>
__device__ __forceinline__ To as(From value) {
  static_assert(sizeof(To) == sizeof(From), "bits are kept");
  To to;
  memcpy(&to, &value, sizeof to);
  return to;
}

}  // namespace discedit::cuda
