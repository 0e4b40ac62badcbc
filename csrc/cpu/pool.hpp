#pragma once

#include "../common/statistics.hpp"
#include "../common/tensor_view.hpp"

namespace discedit {

// Statistics over every axis but 0 (samples) and `channel_axis`, in one read of x and in float64. NaN in a map makes
// each of its statistics NaN.
using Pool = void(const TensorView& x, int channel_axis, const Statistics& statistics, const Planes<double>& out,
                  int threads);

}  // namespace discedit
