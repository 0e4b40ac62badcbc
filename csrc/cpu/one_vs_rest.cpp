// One-vs-rest bounds of every (channel, class), one channel per lane. "The rest" of class k is the merge of classes
// 0..k-1 (running) with classes k+1.. (suffix merges kept per channel): linear in the number of classes, and nothing is
// ever subtracted.
#include "one_vs_rest.hpp"

#include <algorithm>
#include <vector>

#include "../common/witness.hpp"
#include "dispatch.hpp"
#include "law.hpp"
#include "parallel.hpp"

namespace discedit::DISCEDIT_LEVEL {
namespace {

constexpr int group = 8;              // channels that one thread takes: a cache line of each row
constexpr std::int64_t grain = 4096;  // bounds that pay for a thread

// ---- traits: how one class's law is read, merged and compared -------------------------------------------------------

template <Witness witness>
struct ScalarLaw {
  using Moments = MomentsOf<Pack>;
  const MomentState& state;

  DISCEDIT_INLINE Moments load(std::int64_t cls, std::int64_t channel, int width) const {
    return load_law(state, cls, channel, width);
  }
  DISCEDIT_INLINE Moments merged(const Moments& a, const Moments& b) const { return merge(a, b); }
  DISCEDIT_INLINE Pack between(Bound bound, const Moments& a, const Moments& b) const {
    if constexpr (witness == Witness::linear) return bound_of(bound, linear_witness(a, b), 1);
    else return bound_of(bound, quadratic_witness(a, b), 2);
  }
};

template <int Size, bool Fixed>
struct VectorLaw {
  using Moments = VectorMomentsOf<Pack, Size>;
  const VectorState& state;

  DISCEDIT_INLINE int dimension() const { return Fixed ? Size : state.dimension; }
  DISCEDIT_INLINE Moments load(std::int64_t cls, std::int64_t channel, int width) const {
    return load_law<Size>(state, dimension(), cls, channel, width);
  }
  DISCEDIT_INLINE Moments merged(const Moments& a, const Moments& b) const { return merge(a, b, dimension()); }
  DISCEDIT_INLINE Pack between(Bound bound, const Moments& a, const Moments& b) const {
    return bound_of(bound, vector_witness(a, b, dimension()), dimension());
  }
};

// ---- kernel ---------------------------------------------------------------------------------------------------------

template <typename Law>
void run(const Law& law, Bound bound, double* out, int threads) {
  const std::int64_t classes = law.state.classes, channels = law.state.channels;
  parallel_for(
      (channels + group - 1) / group, grain / (classes + 1) / group, threads,
      [&](std::int64_t begin, std::int64_t end) {
        std::vector<typename Law::Moments> suffix(static_cast<std::size_t>(classes) + 1);
        for (std::int64_t channel = begin * group; channel < std::min(end * group, channels); channel += pack_lanes) {
          const int width = static_cast<int>(std::min<std::int64_t>(pack_lanes, channels - channel));
          for (std::int64_t cls = classes - 1; cls > 0; --cls)
            suffix[static_cast<std::size_t>(cls)] =
                law.merged(suffix[static_cast<std::size_t>(cls) + 1], law.load(cls, channel, width));
          typename Law::Moments before;
          for (std::int64_t cls = 0; cls < classes; ++cls) {
            const typename Law::Moments own = law.load(cls, channel, width);
            const typename Law::Moments rest = law.merged(before, suffix[static_cast<std::size_t>(cls) + 1]);
            double values[pack_lanes];
            select((own.n > 0.0) & (rest.n > 0.0), law.between(bound, own, rest), Pack(not_a_number)).store(values);
            for (int lane = 0; lane < width; ++lane) out[(channel + lane) * classes + cls] = values[lane];
            before = law.merged(before, own);
          }
        }
      });
}

}  // namespace

// ---- dispatch -------------------------------------------------------------------------------------------------------

void one_vs_rest(const MomentState& state, Bound bound, Witness witness, double* out, int threads) {
  if (witness == Witness::linear) return run(ScalarLaw<Witness::linear>{state}, bound, out, threads);
  return run(ScalarLaw<Witness::quadratic>{state}, bound, out, threads);
}

void one_vs_rest_vector(const VectorState& state, Bound bound, double* out, int threads) {
  switch (state.dimension) {
    case 1: return run(VectorLaw<1, true>{state}, bound, out, threads);
    case 2: return run(VectorLaw<2, true>{state}, bound, out, threads);
    case 3: return run(VectorLaw<3, true>{state}, bound, out, threads);
    case 4: return run(VectorLaw<4, true>{state}, bound, out, threads);
    case 8: return run(VectorLaw<8, true>{state}, bound, out, threads);
    default: return run(VectorLaw<max_vector, false>{state}, bound, out, threads);
  }
}

}  // namespace discedit::DISCEDIT_LEVEL
