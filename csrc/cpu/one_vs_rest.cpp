// One-vs-rest bounds of every (channel, class). "The rest" of class k is the merge of classes 0..k-1 (running) with
// classes k+1.. (suffix merges kept per channel): linear in the number of classes, and nothing is ever subtracted.
#include "one_vs_rest.hpp"

#include <limits>
#include <vector>

#include "../common/witness.hpp"
#include "parallel.hpp"

namespace discedit {
namespace {

double bound_between(const Moments& one, const Moments& two, Bound bound, Witness witness) {
  if (one.n == 0 || two.n == 0) return std::numeric_limits<double>::quiet_NaN();
  if (witness == Witness::linear) {
    LawPair<1> pair;
    return linear_witness(one, two, pair) ? bound_of<1>(bound, pair, 1) : 0.0;
  }
  LawPair<2> pair;
  return quadratic_witness(one, two, pair) ? bound_of<2>(bound, pair, 2) : 0.0;
}

}  // namespace

void one_vs_rest(const MomentState& state, Bound bound, Witness witness, double* out, int threads) {
  const std::int64_t classes = state.classes;
  parallel_for(state.channels, 4096 / (classes + 1) + 1, threads, [&](std::int64_t begin, std::int64_t end) {
    std::vector<Moments> suffix(static_cast<std::size_t>(classes) + 1);
    for (std::int64_t channel = begin; channel < end; ++channel) {
      for (std::int64_t cls = classes - 1; cls >= 0; --cls)
        suffix[static_cast<std::size_t>(cls)] =
            merge(suffix[static_cast<std::size_t>(cls) + 1], state.at(cls, channel));
      Moments before;
      for (std::int64_t cls = 0; cls < classes; ++cls) {
        const Moments own = state.at(cls, channel);
        const Moments rest = merge(before, suffix[static_cast<std::size_t>(cls) + 1]);
        out[channel * classes + cls] = bound_between(own, rest, bound, witness);
        before = merge(before, own);
      }
    }
  });
}

}  // namespace discedit
