#pragma once

#include "../common/tensor_view.hpp"
#include "../common/window.hpp"
#include "stream.hpp"

namespace discedit::cuda {

// Number of float64 that `scratch` must hold.
std::int64_t patch_moments_scratch(const TensorView& x, const Window& rows, const Window& columns,
                                   std::int64_t positions);

// Of each channel's patches, over samples and positions: mean[channel * taps + tap] and
// scatter[(channel * taps + tap) * taps + other], about the mean. x: (samples, channels, height, width). The positions
// lie in device memory and must be in range.
void patch_moments(const TensorView& x, const Window& rows, const Window& columns, const Positions& positions,
                   double* mean, double* scatter, double* scratch, Stream stream);

}  // namespace discedit::cuda
