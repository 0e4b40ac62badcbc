// Borrowed state of one layer, channels innermost.
#pragma once

#include <cstdint>

namespace discedit {

// Of a scalar statistic: count per class; mean and central moment sums per (class, channel).
struct MomentState {
  std::int64_t classes, channels;
  std::int64_t* count;
  double* mean;
  double* m2;
  double* m3;
  double* m4;
};

constexpr int max_vector = 8;
constexpr int triangle(int d) { return d * (d + 1) / 2; }  // entries of the lower triangle, row by row

// Of a vector of `dimension` statistics: mean[(i * classes + cls) * channels + channel]; scatter, the sums of products
// of deviations, with i running over the entries of the lower triangle.
struct VectorState {
  int dimension;
  std::int64_t classes, channels;
  std::int64_t* count;
  double* mean;
  double* scatter;
};

}  // namespace discedit
