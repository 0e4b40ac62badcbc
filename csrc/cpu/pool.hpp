#pragma once

#include <cstdint>

#include "../common/tensor_view.hpp"

namespace discedit {

enum class Statistic { mean, sum, l2, rms, absmax, max, positive_fraction };
constexpr int max_statistics = 7;

struct Statistics {
  int count = 0;
  Statistic list[max_statistics] = {};
};

// Pooled features: that of a statistic, sample and channel at data[statistic * plane + sample * row + channel].
template <typename Float64>
struct Planes {
  Float64* data;
  std::int64_t row, plane;
};

// Statistics over every axis but 0 (samples) and `channel_axis`, in one read of x and in float64. NaN in a map makes
// each of its statistics NaN.
using Pool = void(const TensorView& x, int channel_axis, const Statistics& statistics, const Planes<double>& out,
                  int threads);

}  // namespace discedit
