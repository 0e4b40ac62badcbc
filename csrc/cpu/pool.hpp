#pragma once

#include "../common/tensor_view.hpp"

namespace discedit {

// Mean over every axis but 0 (samples) and `channel_axis`, in float64: out[sample * channels + channel].
void pool_mean(const TensorView& x, int channel_axis, double* out, int threads);

}  // namespace discedit
