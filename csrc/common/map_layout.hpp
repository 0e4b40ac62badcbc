// How the elements of a feature map lie in memory: samples, channels, and the axes that are pooled over.
#pragma once

#include <cstdint>
#include <cstdlib>

#include "host_device.hpp"
#include "tensor_view.hpp"

namespace discedit {

struct Layout {  // the axes that are pooled over, neighbours fused, innermost (smallest stride) last
  std::int64_t samples, channels, elements;
  std::int64_t sample_stride, channel_stride;
  int axes;
  std::int64_t size[TensorView::max_axes];
  std::int64_t stride[TensorView::max_axes];

  DISCEDIT_HD std::int64_t inner() const { return axes ? size[axes - 1] : 1; }
  DISCEDIT_HD std::int64_t inner_stride() const { return axes ? stride[axes - 1] : 1; }

  // Channels side by side, and the elements of a map not: channels_last, tokens, features without axes.
  DISCEDIT_HD bool by_columns() const {
    return channel_stride == 1 && channels > 1 && (axes == 0 || inner_stride() != 1);
  }

  // Offset of the end of the tensor's last element in memory; 0 where some stride is negative.
  std::int64_t reach() const {
    std::int64_t last = (samples - 1) * sample_stride + (channels - 1) * channel_stride;
    bool forward = sample_stride >= 0 && channel_stride >= 0;
    for (int axis = 0; axis < axes; ++axis) {
      last += (size[axis] - 1) * stride[axis];
      forward = forward && stride[axis] >= 0;
    }
    return forward ? last + 1 : 0;
  }

  // Offset of element `index` of a map.
  DISCEDIT_HD std::int64_t offset(std::int64_t index) const {
    std::int64_t result = 0;
    for (int axis = axes - 1; axis >= 0; --axis) {
      result += (index % size[axis]) * stride[axis];
      index /= size[axis];
    }
    return result;
  }
};

inline Layout layout_of(const TensorView& x, int channel_axis) {
  Layout layout{};
  layout.samples = x.shape[0];
  layout.sample_stride = x.stride[0];
  layout.channels = x.shape[channel_axis];
  layout.channel_stride = x.stride[channel_axis];
  layout.elements = 1;
  struct Axis {
    std::int64_t size, stride;
  };
  Axis kept[TensorView::max_axes];
  int count = 0;
  for (int axis = 1; axis < x.axes; ++axis) {
    if (axis == channel_axis) continue;
    layout.elements *= x.shape[axis];
    if (x.shape[axis] == 1) continue;
    int place = count++;  // insertion keeps the order of equal strides
    for (; place > 0 && std::llabs(kept[place - 1].stride) < std::llabs(x.stride[axis]); --place)
      kept[place] = kept[place - 1];
    kept[place] = {x.shape[axis], x.stride[axis]};
  }
  for (int i = 0; i < count; ++i) {
    const Axis& axis = kept[i];
    if (layout.axes && layout.stride[layout.axes - 1] == axis.stride * axis.size) {
      layout.size[layout.axes - 1] *= axis.size;
      layout.stride[layout.axes - 1] = axis.stride;
    } else {
      layout.size[layout.axes] = axis.size;
      layout.stride[layout.axes] = axis.stride;
      ++layout.axes;
    }
  }
  return layout;
}

}  // namespace discedit
