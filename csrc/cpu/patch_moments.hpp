#pragma once

#include <cstdint>

#include "../common/tensor_view.hpp"

namespace discedit {

// What a convolution reads along one axis of a map.
struct Window {
  static constexpr std::int64_t largest = std::int64_t{1} << 28;  // of a padded map: two axes of these fit 64 bits

  std::int64_t kernel, stride, before, after, dilation, size;  // before, after: zeros around the map's `size`

  std::int64_t extent() const { return (kernel - 1) * dilation + 1; }
  std::int64_t padded() const { return before + size + after; }
  std::int64_t outputs() const { return (padded() - extent()) / stride + 1; }
};

// Flat output positions (row * outputs of a row + column), in range; null: all.
struct Positions {
  const std::int64_t* list;
  std::int64_t count;
};

// Of each channel's patches, over samples and positions: mean[channel * taps + tap] and
// scatter[(channel * taps + tap) * taps + other], about the mean. x: (samples, channels, height, width).
using PatchMoments = void(const TensorView& x, const Window& rows, const Window& columns, const Positions& positions,
                          double* mean, double* scatter, int threads);

}  // namespace discedit
