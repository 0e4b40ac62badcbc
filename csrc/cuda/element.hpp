// Elements of a feature map, and what they are in wider types.
#pragma once

#include "launch.hpp"

namespace discedit::cuda {

struct Float16 {
  std::uint16_t bits;
};
struct BFloat16 {
  std::uint16_t bits;
};

// Exact widening.
__device__ __forceinline__ float narrow(float x) { return x; }
__device__ __forceinline__ float narrow(BFloat16 x) { return as<float>(static_cast<std::uint32_t>(x.bits) << 16); }
__device__ __forceinline__ float narrow(Float16 x) {
#if defined(__CUDA_ARCH__)
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(x.bits));
  return value;
#else
  // Exponent and mantissa moved into place and rescaled by 2^112, which is exact for subnormals too.
  const std::uint32_t moved = (x.bits & 0x7fffu) << 13;
  const auto scaled = as<std::uint32_t>(as<float>(moved) * 0x1p112f);
  const std::uint32_t special = (x.bits & 0x7c00u) == 0x7c00u ? moved | 0x7f800000u : scaled;
  return as<float>(special | (x.bits & 0x8000u) << 16);
#endif
}
__device__ __forceinline__ double widen(double x) { return x; }
template <typename T>
__device__ __forceinline__ double widen(T x) {
  return narrow(x);
}

}  // namespace discedit::cuda
