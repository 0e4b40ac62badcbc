// Borrowed labels of a batch and state of one layer, channels innermost.
#pragma once

#include <cstdint>

namespace discedit {

// One class index per sample; checked to lie in [0, classes) before any state is touched.
struct Labels {
  const std::int64_t* data;
  std::int64_t samples;
};

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

// Of a vector of `dimension` statistics: mean[(i * classes + cls) * channels + channel]; scatter, the sums of products
// of deviations, with i running over the lower(dimension, 0) entries of the lower triangle, row by row.
struct VectorState {
  int dimension;
  std::int64_t classes, channels;
  std::int64_t* count;
  double* mean;
  double* scatter;
};

}  // namespace discedit
