#pragma once

#include <cstdint>

#include "../common/moments.hpp"
#include "../common/tensor_view.hpp"

namespace discedit {

// Borrowed state of one layer: count per class; mean and central moment sums per (class, channel), channels innermost.
struct MomentState {
  std::int64_t classes, channels;
  std::int64_t* count;
  double* mean;
  double* m2;
  double* m3;
  double* m4;

  Moments at(std::int64_t cls, std::int64_t channel) const {
    const std::int64_t i = cls * channels + channel;
    return {static_cast<double>(count[cls]), mean[i], m2[i], m3[i], m4[i]};
  }
  // Stores all but the count, which belongs to the class as a whole.
  void put(std::int64_t cls, std::int64_t channel, const Moments& value) const {
    const std::int64_t i = cls * channels + channel;
    mean[i] = value.mean;
    m2[i] = value.m2;
    m3[i] = value.m3;
    m4[i] = value.m4;
  }
};

// Pools the feature map to its mean and merges the batch's per-class moments into the state.
// `labels` holds one class index per sample, each in [0, classes): checked here, before the state is touched.
void class_moments(const TensorView& x, int channel_axis, const std::int64_t* labels, const MomentState& state,
                   int threads);

}  // namespace discedit
