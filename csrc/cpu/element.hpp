// Widening loads: one element of any supported type as float64.
#pragma once

#include <cstdint>
#include <cstring>

#include "dispatch.hpp"

namespace discedit {

struct Float16 {
  std::uint16_t bits;
};
struct BFloat16 {
  std::uint16_t bits;
};

DISCEDIT_INLINE double widen(double value) { return value; }
DISCEDIT_INLINE double widen(float value) { return value; }

DISCEDIT_INLINE double widen(BFloat16 value) {
  const std::uint32_t bits = static_cast<std::uint32_t>(value.bits) << 16;
  float wide;
  std::memcpy(&wide, &bits, sizeof wide);
  return wide;
}

// Exponent and mantissa moved into place, then rescaled by 2^112, which is exact and makes subnormals right as well;
// all-ones exponents (Inf, NaN) get the float32 exponent back.
DISCEDIT_INLINE double widen(Float16 value) {
  const std::uint32_t half = value.bits;
  const std::uint32_t sign = (half & 0x8000u) << 16;
  const std::uint32_t special = (half & 0x7c00u) == 0x7c00u ? 0x7f800000u : 0u;
  const std::uint32_t moved = (half & 0x7fffu) << 13;
  float scaled;
  std::memcpy(&scaled, &moved, sizeof scaled);
  scaled *= 5192296858534827628530496329220096.0f;  // 2^112
  std::uint32_t bits;
  std::memcpy(&bits, &scaled, sizeof bits);
  bits = (special ? (special | moved) : bits) | sign;
  float wide;
  std::memcpy(&wide, &bits, sizeof wide);
  return wide;
}

}  // namespace discedit
