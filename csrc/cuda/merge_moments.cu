// Exact merge of two states: one thread for each (class, channel), then the counts.
#include "merge_moments.hpp"

#include "law.hpp"

namespace discedit::cuda {
namespace {

constexpr int threads = 256;

// ---- kernels --------------------------------------------------------------------------------------------------------

template <typename Body>
__device__ __forceinline__ void over_laws(std::int64_t classes, std::int64_t channels, const std::int64_t* count,
                                          const Body& body) {
  const std::int64_t step = static_cast<std::int64_t>(gridDim.x) * threads, size = classes * channels;
  for (std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * threads + threadIdx.x; i < size; i += step)
    if (count[i / channels] != 0) body(i / channels, i % channels);
}

// occupancy: 4 blocks of 256 threads per SM
__global__ void __launch_bounds__(threads, 4) merge_scalars(MomentState into, MomentState from) {
  over_laws(into.classes, into.channels, from.count, [&](std::int64_t cls, std::int64_t channel) {
    store_law(merge(load_law(into, cls, channel), load_law(from, cls, channel)), into, cls, channel);
  });
}

// occupancy: 1 block of 256 threads per SM
// local memory: 256 bytes per thread
template <int Size>
__global__ void __launch_bounds__(threads, Size <= 4 ? 2 : 1) merge_vectors(VectorState into, VectorState from) {
  over_laws(into.classes, into.channels, from.count, [&](std::int64_t cls, std::int64_t channel) {
    const auto merged = merge(load_law<Size>(into, cls, channel), load_law<Size>(from, cls, channel), Size);
    store_law(merged, into, cls, channel);
  });
}

// occupancy: 8 blocks of 256 threads per SM
__global__ void __launch_bounds__(threads, 8)
    merge_counts(std::int64_t* into, const std::int64_t* from, std::int64_t classes) {
  const std::int64_t step = static_cast<std::int64_t>(gridDim.x) * threads;
  for (std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * threads + threadIdx.x; i < classes; i += step)
    into[i] += from[i];
}

// ---- launcher -------------------------------------------------------------------------------------------------------

template <typename State>
void run(void (*kernel)(State, State), const State& into, const State& from, Stream stream) {
  constexpr const char* op = "merge_moments";
  launch(op, kernel, ceil_div(into.classes * into.channels, threads), threads, stream, into, from);
  launch(op, merge_counts, ceil_div(into.classes, threads), threads, stream, into.count, from.count, into.classes);
}

}  // namespace

// ---- dispatch -------------------------------------------------------------------------------------------------------

void merge_moments(const MomentState& into, const MomentState& from, Stream stream) {
  run(merge_scalars, into, from, stream);
}

void merge_vector_moments(const VectorState& into, const VectorState& from, Stream stream) {
  if (into.dimension <= 2) return run(merge_vectors<2>, into, from, stream);
  if (into.dimension <= 4) return run(merge_vectors<4>, into, from, stream);
  return run(merge_vectors<max_vector>, into, from, stream);
}

}  // namespace discedit::cuda
