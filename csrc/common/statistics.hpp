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

// What is accumulated for them. NaN in a map shows in `top` as bits above those of infinity, and in sums by itself.
struct Parts {
  enum : int { sum = 1, square = 2, top = 4, peak = 8, positive = 16 };
};

inline int parts_of(const Statistics& statistics) {
  int parts = 0;
  for (int i = 0; i < statistics.count; ++i) switch (statistics.list[i]) {
      case Statistic::mean:
      case Statistic::sum: parts |= Parts::sum; break;
      case Statistic::l2:
      case Statistic::rms: parts |= Parts::square; break;
      case Statistic::absmax: parts |= Parts::top; break;
      case Statistic::max: parts |= Parts::peak | Parts::top; break;
      case Statistic::positive_fraction: parts |= Parts::positive | Parts::top; break;
    }
  return parts;
}

// Pooled features: that of a statistic, sample and channel at data[statistic * plane + sample * row + channel].
template <typename Float64>
struct Planes {
  Float64* data;
  std::int64_t row, plane;
};

}  // namespace discedit
