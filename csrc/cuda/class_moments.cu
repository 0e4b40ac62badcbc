// Per-class moments of pooled features. Split of work: a block for each (sample, tile of channels), of which only the
// first sample of a class works, for the whole class: nothing grows with the number of classes. Its warps take the
// class's samples in turn, its lanes the channels.
#include "class_moments.hpp"

#undef NDEBUG  // the assertion is for users
#include <cassert>

#include "law.hpp"

namespace discedit::cuda {
namespace {

// ---- traits ---------------------------------------------------------------------------------------------------------

constexpr int tile = 32;  // channels of a block, one for each lane of a warp
constexpr int lanes = 8;  // samples side by side: one for each warp
constexpr int threads = tile * lanes;
static_assert((lanes & (lanes - 1)) == 0, "lanes are merged in pairs");

// How the work is cut: a block's worth for each sample and tile.
struct Cut {
  std::int64_t items, tiles;
  int shift;  // bits of a count that are left beside one more than `tiles`, without the sign
};

// ---- kernels --------------------------------------------------------------------------------------------------------

// The samples of one class, `threads` positions of the batch at a time. All threads of the block call every function.
struct Members {
  Labels labels;
  const std::int64_t* order;
  std::int64_t classes;

  __device__ __forceinline__ std::int64_t sample_at(std::int64_t position) const {
    return order ? order[position] : position;
  }
  // -1 for a sample that is left out.
  __device__ __forceinline__ std::int64_t label_at(std::int64_t position) const {
    const std::int64_t sample = sample_at(position);
    if (sample < 0 || sample >= labels.samples) return -1;
    const std::int64_t cls = labels.data[sample];
    return cls < classes ? cls : -1;
  }

  // Whether no position before this one has its class.
  __device__ __forceinline__ bool is_first(std::int64_t position, std::int64_t cls) const {
    if (order) return position == 0 || label_at(position - 1) != cls;
    for (std::int64_t from = 0; from < position; from += threads) {
      const std::int64_t other = from + threadIdx.x;
      if (__syncthreads_or(other < position && label_at(other) == cls)) return false;
    }
    return true;
  }

  // Calls body(sample, rank) for this thread's share of the class's samples, in their order; returns their number. The
  // share depends on a sample's rank in its class alone, so that `order` or none gives the same bits.
  template <typename Body>
  __device__ __forceinline__ std::int64_t each(std::int64_t first, std::int64_t cls, std::int64_t (&found)[threads],
                                               const Body& body) const {
    __shared__ int of_warp[lanes];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    std::int64_t rank = 0;
    for (std::int64_t from = first; from < labels.samples; from += threads) {
      const std::int64_t position = from + threadIdx.x;
      const bool mine = position < labels.samples && label_at(position) == cls;
      const unsigned votes = __ballot_sync(whole_warp, mine);
      if (lane == 0) of_warp[warp] = __popc(votes);
      __syncthreads();
      int place = __popc(votes & ((1u << lane) - 1)), count = 0;
      for (int other = 0; other < lanes; ++other) {
        if (other < warp) place += of_warp[other];
        count += of_warp[other];
      }
      if (mine) found[place] = sample_at(position);
      __syncthreads();
      for (int i = static_cast<int>((warp - rank) & (lanes - 1)); i < count; i += lanes) body(found[i], rank + i);
      rank += count;
      __syncthreads();  // before `found` is filled again
      if (order && count < threads) break;
    }
    return rank;
  }
};

// Sum over the warps of each lane's value, for every thread: a fixed tree.
__device__ __forceinline__ double over_warps(double value, double (&memory)[lanes][tile]) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  memory[warp][lane] = value;
  __syncthreads();
  double sums[lanes];
#pragma unroll
  for (int i = 0; i < lanes; ++i) sums[i] = memory[i][lane];
#pragma unroll
  for (int step = 1; step < lanes; step *= 2)
#pragma unroll
    for (int i = 0; i < lanes; i += 2 * step) sums[i] += sums[i + step];
  __syncthreads();
  return sums[0];
}

// Labels outside the classes are refused on the device, as torch's own indexing does it: nobody waits to see them.
// Where assertions are off, their samples are left out.
__device__ __forceinline__ void check_label(bool in_range) {
#if defined(__CUDA_ARCH__)
  assert(in_range && "class_moments: labels must lie in 0..num_classes - 1");
#else
  (void)in_range;
#endif
}

// A class's count in the state, which the blocks of all its tiles read and the last of them raises. Until then the
// upper bits say how many are done: no second kernel, no memory of its own, and nothing that depends on their order.
struct Count {
  std::int64_t* at;
  std::int64_t tiles;
  int shift;  // the lower bits hold the count

  // All lanes of a warp call.
  __device__ __forceinline__ double before() const {
    const std::int64_t read = threadIdx.x % 32 == 0 ? *static_cast<volatile std::int64_t*>(at) : 0;
    return static_cast<double>(__shfl_sync(whole_warp, read, 0) & ((std::int64_t{1} << shift) - 1));
  }
  // One thread of a block calls, the one that read.
  __device__ __forceinline__ void add(std::int64_t samples) const {
    auto* bits = reinterpret_cast<unsigned long long*>(at);
    const auto done = static_cast<std::int64_t>(atomicAdd(bits, 1ull << shift) >> shift) + 1;
    if (done == tiles) atomicAdd(bits, static_cast<unsigned long long>(samples - (tiles << shift)));
  }
};

// Merges one class's samples into the state. The mean is first sample + mean deviation from it, so that a constant
// channel gets its exact value.
// occupancy: 3 blocks of 256 threads per SM
__global__ void __launch_bounds__(threads, 3)
    fold(const double* pooled, double scale, Members members, MomentState state, Cut cut) {
  __shared__ std::int64_t found[threads];
  __shared__ double memory[lanes][tile];
  const std::int64_t samples = members.labels.samples;
  for (std::int64_t item = blockIdx.x; item < cut.items; item += gridDim.x) {
    const std::int64_t position = item % samples, channel = item / samples * tile + threadIdx.x % 32;
    const std::int64_t cls = members.label_at(position);
    check_label(cls >= 0);
    if (cls < 0 || !members.is_first(position, cls)) continue;
    const bool exists = channel < state.channels;
    const auto value = [&](std::int64_t sample) {
      if (!exists) return 0.0;
      const double t = pooled[sample * state.channels + channel];
      return scale == 0 ? t : exp(-scale * t);
    };
    const double first = value(members.sample_at(position));
    double residual = 0;
    const std::int64_t count = members.each(position, cls, found, [&](std::int64_t sample, std::int64_t rank) {
      if (rank > 0) residual += value(sample) - first;
    });
    Moments law;
    law.n = static_cast<double>(count);
    law.mean = first + over_warps(residual, memory) / law.n;
    residual = 0;
    members.each(position, cls, found, [&](std::int64_t sample, std::int64_t) {
      const double d = value(sample) - law.mean, d2 = d * d;
      residual += d;
      law.m2 += d2;
      law.m3 += d2 * d;
      law.m4 += d2 * d2;
    });
    residual = over_warps(residual, memory);
    law.m2 = over_warps(law.m2, memory);
    law.m3 = over_warps(law.m3, memory);
    law.m4 = over_warps(law.m4, memory);
    // The stored mean is rounded; what that leaves in the deviations is known and taken out to first order.
    const double r = residual / law.n;
    law.m4 -= 4 * r * law.m3;
    law.m3 -= 3 * r * law.m2;
    law.m2 -= r * residual;
    law.m2 = law.m2 < 0 ? 0 : law.m2;
    if (threadIdx.x / 32 == 0) {
      const Count total{state.count + cls, cut.tiles, cut.shift};
      const double n = total.before();
      if (exists) {
        Moments before = load_law(state, cls, channel);
        before.n = n;
        store_law(merge(before, law), state, cls, channel);
      }
      if (threadIdx.x == 0) total.add(count);
    }
  }
}

// The same for vectors of up to Size statistics.
// occupancy: 1 block of 256 threads per SM
// local memory: 256 bytes per thread
template <int Size>
__global__ void __launch_bounds__(threads, Size <= 4 ? 2 : 1)
    fold_vector(const double* pooled, Members members, VectorState state, Cut cut) {
  __shared__ std::int64_t found[threads];
  __shared__ double memory[lanes][tile];
  const std::int64_t samples = members.labels.samples, plane = samples * state.channels;
  for (std::int64_t item = blockIdx.x; item < cut.items; item += gridDim.x) {
    const std::int64_t position = item % samples, channel = item / samples * tile + threadIdx.x % 32;
    const std::int64_t cls = members.label_at(position);
    check_label(cls >= 0);
    if (cls < 0 || !members.is_first(position, cls)) continue;
    const bool exists = channel < state.channels;
    const auto value = [&](std::int64_t sample, int i) {
      return exists && i < state.dimension ? pooled[i * plane + sample * state.channels + channel] : 0.0;
    };
    double first[Size], residual[Size] = {};
#pragma unroll
    for (int i = 0; i < Size; ++i) first[i] = value(members.sample_at(position), i);
    const std::int64_t count = members.each(position, cls, found, [&](std::int64_t sample, std::int64_t rank) {
      if (rank == 0) return;
#pragma unroll
      for (int i = 0; i < Size; ++i) residual[i] += value(sample, i) - first[i];
    });
    VectorMomentsOf<double, Size> law;
    law.n = static_cast<double>(count);
#pragma unroll
    for (int i = 0; i < Size; ++i) {
      law.mean[i] = first[i] + over_warps(residual[i], memory) / law.n;
      residual[i] = 0;
    }
    members.each(position, cls, found, [&](std::int64_t sample, std::int64_t) {
      double x[Size];
#pragma unroll
      for (int i = 0; i < Size; ++i) {
        x[i] = value(sample, i) - law.mean[i];
        residual[i] += x[i];
      }
#pragma unroll
      for (int i = 0; i < Size; ++i)
#pragma unroll
        for (int j = 0; j <= i; ++j) law.scatter[lower(i, j)] += x[i] * x[j];
    });
#pragma unroll
    for (int i = 0; i < Size; ++i) {
      residual[i] = over_warps(residual[i], memory);
#pragma unroll
      for (int j = 0; j <= i; ++j) {
        double& entry = law.scatter[lower(i, j)];
        entry = over_warps(entry, memory) - residual[i] * (residual[j] / law.n);
        if (i == j) entry = entry < 0 ? 0 : entry;
      }
    }
    if (threadIdx.x / 32 == 0) {
      const Count total{state.count + cls, cut.tiles, cut.shift};
      const double n = total.before();
      if (exists) {
        VectorMomentsOf<double, Size> before = load_law<Size>(state, cls, channel);
        before.n = n;
        store_law(merge(before, law, Size), state, cls, channel);
      }
      if (threadIdx.x == 0) total.add(count);
    }
  }
}

// ---- launchers ------------------------------------------------------------------------------------------------------

// A state without channels has a tile all the same, for its counts.
Cut cut_of(std::int64_t samples, std::int64_t channels) {
  const std::int64_t tiles = std::max<std::int64_t>(1, ceil_div(channels, tile));
  Cut cut{samples * tiles, tiles, 62};
  while (tiles >> (63 - cut.shift)) --cut.shift;
  return cut;
}

}  // namespace

// ---- dispatch -------------------------------------------------------------------------------------------------------

void fold_moments(const double* pooled, double scale, const Labels& labels, const std::int64_t* order,
                  const MomentState& state, Stream stream) {
  const Cut cut = cut_of(labels.samples, state.channels);
  launch("fold_moments", fold, cut.items, threads, stream, pooled, scale, Members{labels, order, state.classes}, state,
         cut);
}

void fold_vector_moments(const double* pooled, const Labels& labels, const std::int64_t* order,
                         const VectorState& state, Stream stream) {
  const Cut cut = cut_of(labels.samples, state.channels);
  const auto kernel = state.dimension <= 2 ? fold_vector<2> : state.dimension <= 4 ? fold_vector<4> : fold_vector<8>;
  launch("fold_moments", kernel, cut.items, threads, stream, pooled, Members{labels, order, state.classes}, state, cut);
}

}  // namespace discedit::cuda
