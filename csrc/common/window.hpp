// What a convolution reads, and where.
#pragma once

#include <cstdint>

#include "host_device.hpp"

namespace discedit {

// Along one axis of a map.
struct Window {
  static constexpr std::int64_t largest = std::int64_t{1} << 28;  // of a padded map: two axes of these fit 64 bits

  std::int64_t kernel, stride, before, after, dilation, size;  // before, after: zeros around the map's `size`

  DISCEDIT_HD std::int64_t extent() const { return (kernel - 1) * dilation + 1; }
  DISCEDIT_HD std::int64_t padded() const { return before + size + after; }
  DISCEDIT_HD std::int64_t outputs() const { return (padded() - extent()) / stride + 1; }
};

// Flat output positions (row * outputs of a row + column), in range; null: all.
struct Positions {
  const std::int64_t* list;
  std::int64_t count;
};

}  // namespace discedit
