#pragma once

#include "../common/tensor_view.hpp"
#include "../common/window.hpp"

namespace discedit {

// Of each channel's patches, over samples and positions: mean[channel * taps + tap] and
// scatter[(channel * taps + tap) * taps + other], about the mean. x: (samples, channels, height, width).
using PatchMoments = void(const TensorView& x, const Window& rows, const Window& columns, const Positions& positions,
                          double* mean, double* scatter, int threads);

}  // namespace discedit
