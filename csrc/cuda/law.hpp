// Moments of one class and channel: from a state into registers and back. Loops run over the capacity `Size`, with what
// lies beyond the dimension left out, so that every index is a constant and nothing lives in local memory.
#pragma once

#include "../common/bounds.hpp"
#include "../common/moment_state.hpp"
#include "../common/witness.hpp"
#include "launch.hpp"

namespace discedit::cuda {

__device__ __forceinline__ Moments load_law(const MomentState& state, std::int64_t cls, std::int64_t channel) {
  const std::int64_t at = cls * state.channels + channel;
  return {static_cast<double>(state.count[cls]), state.mean[at], state.m2[at], state.m3[at], state.m4[at]};
}

__device__ __forceinline__ void store_law(const Moments& law, const MomentState& state, std::int64_t cls,
                                          std::int64_t channel) {
  const std::int64_t at = cls * state.channels + channel;
  state.mean[at] = law.mean;
  state.m2[at] = law.m2;
  state.m3[at] = law.m3;
  state.m4[at] = law.m4;
}

template <int Size>
__device__ __forceinline__ VectorMomentsOf<double, Size> load_law(const VectorState& state, std::int64_t cls,
                                                                  std::int64_t channel) {
  const std::int64_t plane = state.classes * state.channels, at = cls * state.channels + channel;
  VectorMomentsOf<double, Size> law;
  law.n = static_cast<double>(state.count[cls]);
#pragma unroll
  for (int i = 0; i < Size; ++i)
    if (i < state.dimension) law.mean[i] = state.mean[i * plane + at];
#pragma unroll
  for (int i = 0; i < lower(Size, 0); ++i)
    if (i < lower(state.dimension, 0)) law.scatter[i] = state.scatter[i * plane + at];
  return law;
}

template <int Size>
__device__ __forceinline__ void store_law(const VectorMomentsOf<double, Size>& law, const VectorState& state,
                                          std::int64_t cls, std::int64_t channel) {
  const std::int64_t plane = state.classes * state.channels, at = cls * state.channels + channel;
#pragma unroll
  for (int i = 0; i < Size; ++i)
    if (i < state.dimension) state.mean[i * plane + at] = law.mean[i];
#pragma unroll
  for (int i = 0; i < lower(Size, 0); ++i)
    if (i < lower(state.dimension, 0)) state.scatter[i * plane + at] = law.scatter[i];
}

// ---- a state's laws as the ops that compare classes see them --------------------------------------------------------

template <Witness witness>
struct ScalarLaw {
  using Law = Moments;
  static constexpr int fields = 5;
  MomentState state;

  __device__ __forceinline__ Law load(std::int64_t cls, std::int64_t channel) const {
    return load_law(state, cls, channel);
  }
  __device__ __forceinline__ static Law merged(const Law& a, const Law& b) { return merge(a, b); }
  __device__ __forceinline__ static double between(Bound bound, const Law& a, const Law& b) {
    if constexpr (witness == Witness::linear) return bound_of(bound, linear_witness(a, b), 1);
    else return bound_of(bound, quadratic_witness(a, b), 2);
  }
  // Calls body(place, value) for every number of a law.
  template <typename L, typename Body>
  __device__ __forceinline__ void each(L& law, const Body& body) const {
    body(0, law.n), body(1, law.mean), body(2, law.m2), body(3, law.m3), body(4, law.m4);
  }
};

// What is beyond the state's dimension is 0 in every class: coordinates that drop out of the bound.
template <int Size>
struct VectorLaw {
  using Law = VectorMomentsOf<double, Size>;
  static constexpr int fields = 1 + Size + lower(Size, 0);
  VectorState state;

  __device__ __forceinline__ Law load(std::int64_t cls, std::int64_t channel) const {
    return load_law<Size>(state, cls, channel);
  }
  __device__ __forceinline__ static Law merged(const Law& a, const Law& b) { return merge(a, b, Size); }
  __device__ __forceinline__ static double between(Bound bound, const Law& a, const Law& b) {
    return bound_of(bound, vector_witness(a, b, Size), Size);
  }
  template <typename L, typename Body>
  __device__ __forceinline__ void each(L& law, const Body& body) const {
    body(0, law.n);
#pragma unroll
    for (int i = 0; i < Size; ++i) body(1 + i, law.mean[i]);
#pragma unroll
    for (int i = 0; i < lower(Size, 0); ++i) body(1 + Size + i, law.scatter[i]);
  }
};

}  // namespace discedit::cuda
