// What a feature map is pooled to, and where pooled features lie.
#pragma once

#include <cstdint>

namespace discedit {

constexpr const char* statistic_names[] = {"mean", "sum", "l2", "rms", "absmax", "max", "positive_fraction"};
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

}  // namespace discedit
