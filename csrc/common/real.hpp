// The operations that the solvers need of a number, for double. csrc/cpu gives the same to a vector of doubles, so that
// one solver serves one problem or several side by side: it selects instead of branching.
#pragma once

#include <cmath>
#include <limits>

#include "host_device.hpp"

// A solver is worth its registers only when all of it is inlined where it is used.
#if defined(__CUDACC__)
#define DISCEDIT_HD_INLINE __host__ __device__ __forceinline__
#elif defined(__GNUC__)
#define DISCEDIT_HD_INLINE inline __attribute__((always_inline))
#else
#define DISCEDIT_HD_INLINE inline
#endif

namespace discedit {

constexpr double infinity = std::numeric_limits<double>::infinity();
constexpr double not_a_number = std::numeric_limits<double>::quiet_NaN();

DISCEDIT_HD_INLINE double select(bool where, double yes, double no) { return where ? yes : no; }
DISCEDIT_HD_INLINE bool any(bool value) { return value; }
DISCEDIT_HD_INLINE double absolute(double value) { return std::fabs(value); }
DISCEDIT_HD_INLINE double square_root(double value) { return std::sqrt(value); }
DISCEDIT_HD_INLINE double exponential(double value) { return std::exp(value); }

template <typename Real>
using MaskOf = decltype(Real() < Real());

template <typename Real>
DISCEDIT_HD_INLINE Real larger(Real a, Real b) {  // b where either is NaN
  return select(a > b, a, b);
}

}  // namespace discedit
