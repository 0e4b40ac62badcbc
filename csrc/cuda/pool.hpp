#pragma once

#include "../common/statistics.hpp"
#include "../common/tensor_view.hpp"
#include "stream.hpp"

namespace discedit::cuda {

// Number of float64 that `scratch` must hold; 0 for all but few and long maps.
std::int64_t pool_scratch(const TensorView& x, int channel_axis);

// Statistics over every axis but 0 (samples) and `channel_axis`, in one read of x and in float64, to
// out[(statistic * samples + sample) * channels + channel]. NaN in a map makes each of its statistics NaN.
void pool(const TensorView& x, int channel_axis, const Statistics& statistics, double* out, double* scratch,
          Stream stream);

}  // namespace discedit::cuda
