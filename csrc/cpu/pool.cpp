// Spatial mean of a feature map, one read. Split of work: (sample, channel) rows where a row is contiguous or general;
// samples where the channels are contiguous (channels_last, tokens), each swept once with one accumulator per channel.
#include "pool.hpp"

#include <algorithm>
#include <cstdlib>
#include <vector>

#include "element.hpp"
#include "parallel.hpp"

namespace discedit {
namespace {

// ---- traits ---------------------------------------------------------------------------------------------------------

constexpr int lanes = 16;          // float64 partial sums in flight: two AVX-512 registers, four AVX2
constexpr int channel_tile = 512;  // accumulators of one sweep: 4 KiB, stays in L1
// Elements that pay for a thread. Threads are started per call and share the cores with torch's workers, which spin for
// a while after each of its own ops: in a forward pass on two cores, splitting maps of 4 M elements made the pass
// slower.
constexpr std::int64_t grain = 4 << 20;
static_assert((lanes & (lanes - 1)) == 0, "lanes are combined pairwise");

struct Layout {  // the axes that are averaged over, neighbours fused, innermost (smallest stride) last
  std::int64_t samples, channels, elements;
  std::int64_t sample_stride, channel_stride;
  int axes;
  std::int64_t size[TensorView::max_axes];
  std::int64_t stride[TensorView::max_axes];

  std::int64_t inner() const { return axes ? size[axes - 1] : 1; }
  std::int64_t inner_stride() const { return axes ? stride[axes - 1] : 1; }
  std::int64_t runs() const { return inner() ? elements / inner() : 0; }

  // Offset of the first element of run `run` (an index over all axes but the innermost).
  std::int64_t run_offset(std::int64_t run) const {
    std::int64_t offset = 0;
    for (int axis = axes - 2; axis >= 0; --axis) {
      offset += (run % size[axis]) * stride[axis];
      run /= size[axis];
    }
    return offset;
  }
};

Layout layout_of(const TensorView& x, int channel_axis) {
  Layout layout{};
  layout.samples = x.shape[0];
  layout.sample_stride = x.stride[0];
  layout.channels = x.shape[channel_axis];
  layout.channel_stride = x.stride[channel_axis];
  layout.elements = 1;
  struct Axis {
    std::int64_t size, stride;
  };
  std::vector<Axis> kept;
  for (int axis = 1; axis < x.axes; ++axis) {
    if (axis == channel_axis) continue;
    layout.elements *= x.shape[axis];
    if (x.shape[axis] != 1) kept.push_back({x.shape[axis], x.stride[axis]});
  }
  std::stable_sort(kept.begin(), kept.end(),
                   [](const Axis& a, const Axis& b) { return std::llabs(a.stride) > std::llabs(b.stride); });
  for (const Axis& axis : kept) {
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

// ---- kernels --------------------------------------------------------------------------------------------------------

template <typename T>
DISCEDIT_INLINE void add_run(const T* run, std::int64_t size, double (&sums)[lanes]) {
  std::int64_t i = 0;
  for (; i + lanes <= size; i += lanes)
    for (int lane = 0; lane < lanes; ++lane) sums[lane] += widen(run[i + lane]);
  for (int lane = 0; i + lane < size; ++lane) sums[lane] += widen(run[i + lane]);
}

DISCEDIT_INLINE double combine(double (&sums)[lanes]) {
  for (int width = lanes / 2; width > 0; width /= 2)
    for (int lane = 0; lane < width; ++lane) sums[lane] += sums[lane + width];
  return sums[0];
}

// Rows [begin, end) of samples x channels.
template <typename T>
DISCEDIT_INLINE void mean_of_rows(const T* x, const Layout& layout, std::int64_t begin, std::int64_t end, double* out) {
  const std::int64_t inner = layout.inner(), inner_stride = layout.inner_stride(), runs = layout.runs();
  const double elements = static_cast<double>(layout.elements);
  for (std::int64_t row = begin; row < end; ++row) {
    const std::int64_t sample = row / layout.channels, channel = row % layout.channels;
    const T* start = x + sample * layout.sample_stride + channel * layout.channel_stride;
    double sums[lanes] = {};
    for (std::int64_t run = 0; run < runs; ++run) {
      const T* first = runs == 1 ? start : start + layout.run_offset(run);
      if (inner_stride == 1) {
        add_run(first, inner, sums);
      } else {
        for (std::int64_t i = 0; i < inner; ++i) sums[i % lanes] += widen(first[i * inner_stride]);
      }
    }
    out[row] = combine(sums) / elements;
  }
}

// Samples [begin, end); channel stride 1.
template <typename T>
DISCEDIT_INLINE void mean_of_samples(const T* x, const Layout& layout, std::int64_t begin, std::int64_t end,
                                     double* out) {
  const std::int64_t inner = layout.inner(), inner_stride = layout.inner_stride(), runs = layout.runs();
  const double elements = static_cast<double>(layout.elements);
  for (std::int64_t sample = begin; sample < end; ++sample)
    for (std::int64_t tile = 0; tile < layout.channels; tile += channel_tile) {
      const int width = static_cast<int>(std::min<std::int64_t>(channel_tile, layout.channels - tile));
      double sums[channel_tile] = {};
      const T* start = x + sample * layout.sample_stride + tile;
      for (std::int64_t run = 0; run < runs; ++run) {
        const T* first = start + layout.run_offset(run);
        for (std::int64_t i = 0; i < inner; ++i) {
          const T* position = first + i * inner_stride;
          for (int channel = 0; channel < width; ++channel) sums[channel] += widen(position[channel]);
        }
      }
      double* row = out + sample * layout.channels + tile;
      for (int channel = 0; channel < width; ++channel) row[channel] = sums[channel] / elements;
    }
}

// ---- launchers: one clone set per element type ----------------------------------------------------------------------

#define DISCEDIT_POOL_LAUNCHERS(Element)                                                                     \
  DISCEDIT_CLONES void rows(const Element* x, const Layout& layout, std::int64_t begin, std::int64_t end,    \
                            double* out) {                                                                   \
    mean_of_rows(x, layout, begin, end, out);                                                                \
  }                                                                                                          \
  DISCEDIT_CLONES void samples(const Element* x, const Layout& layout, std::int64_t begin, std::int64_t end, \
                               double* out) {                                                                \
    mean_of_samples(x, layout, begin, end, out);                                                             \
  }

DISCEDIT_POOL_LAUNCHERS(double)
DISCEDIT_POOL_LAUNCHERS(float)
DISCEDIT_POOL_LAUNCHERS(BFloat16)
DISCEDIT_POOL_LAUNCHERS(Float16)
#undef DISCEDIT_POOL_LAUNCHERS

template <typename T>
void launch(const TensorView& x, int channel_axis, double* out, int threads) {
  const T* data = static_cast<const T*>(x.data);
  const Layout layout = layout_of(x, channel_axis);
  const bool channels_inner = layout.channel_stride == 1 && (layout.axes == 0 || layout.inner_stride() != 1);
  if (channels_inner) {
    const std::int64_t work = std::max<std::int64_t>(1, layout.elements * layout.channels);
    parallel_for(layout.samples, grain / work + 1, threads,
                 [&](std::int64_t begin, std::int64_t end) { samples(data, layout, begin, end, out); });
  } else {
    const std::int64_t work = std::max<std::int64_t>(1, layout.elements);
    parallel_for(layout.samples * layout.channels, grain / work + 1, threads,
                 [&](std::int64_t begin, std::int64_t end) { rows(data, layout, begin, end, out); });
  }
}

}  // namespace

// ---- dispatch -------------------------------------------------------------------------------------------------------

void pool_mean(const TensorView& x, int channel_axis, double* out, int threads) {
  switch (x.dtype) {
    case DType::float32: return launch<float>(x, channel_axis, out, threads);
    case DType::float64: return launch<double>(x, channel_axis, out, threads);
    case DType::bfloat16: return launch<BFloat16>(x, channel_axis, out, threads);
    case DType::float16: return launch<Float16>(x, channel_axis, out, threads);
    default:
      throw std::invalid_argument(std::string("pool: x must be float16, bfloat16, float32 or float64, got ") +
                                  name(x.dtype) + ".");
  }
}

}  // namespace discedit
