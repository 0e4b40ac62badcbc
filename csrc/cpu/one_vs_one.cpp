// Every class against every other, or against the rest, by any member of the family, one channel per lane. Pairs are
// streamed: nothing grows with their number but `all_pairs`.
#include "one_vs_one.hpp"

#include <algorithm>
#include <vector>

#include "dispatch.hpp"
#include "exponential.hpp"
#include "law.hpp"
#include "parallel.hpp"

namespace discedit::DISCEDIT_LEVEL {
namespace {

constexpr int group = 8;              // channels that one thread takes: a cache line of each row
constexpr std::int64_t grain = 4096;  // comparisons that pay for a thread

// ---- traits: how one class's law is read, merged and compared -------------------------------------------------------

struct ScalarLaw {
  using Moments = MomentsOf<Pack>;
  const MomentState& state;
  const Rule& rule;
  Witness witness;

  Moments load(std::int64_t cls, std::int64_t channel, int width) const { return load_law(state, cls, channel, width); }
  static Moments merged(const Moments& a, const Moments& b) { return merge(a, b); }
  Pack between(const Moments& a, const Moments& b) const {
    switch (rule.member) {
      case Member::witness: return witness_between(false, a, b);
      case Member::witness_published: return witness_between(true, a, b);
      case Member::certified: return certified_between(rule, a, b);
      default: break;
    }
    if (witness == Witness::linear) return member_between(rule, linear_witness(a, b), a.n, b.n, 1);
    return member_between(rule, quadratic_witness(a, b), a.n, b.n, 2);
  }
};

struct VectorLaw {
  using Moments = VectorMomentsOf<Pack, max_vector>;
  const VectorState& state;
  const Rule& rule;

  Moments load(std::int64_t cls, std::int64_t channel, int width) const {
    return load_law<max_vector>(state, state.dimension, cls, channel, width);
  }
  Moments merged(const Moments& a, const Moments& b) const { return merge(a, b, state.dimension); }
  Pack between(const Moments& a, const Moments& b) const {
    return member_between(rule, vector_witness(a, b, state.dimension), a.n, b.n, state.dimension);
  }
};

// ---- kernels: a pack of channels ------------------------------------------------------------------------------------

template <typename Law>
void with_rest(const Law& law, std::int64_t channel, int width, double* out) {
  using Moments = typename Law::Moments;
  const std::int64_t classes = law.state.classes;
  std::vector<Moments> after(static_cast<std::size_t>(classes) + 1);
  for (std::int64_t cls = classes - 1; cls > 0; --cls)
    after[static_cast<std::size_t>(cls)] =
        law.merged(after[static_cast<std::size_t>(cls) + 1], law.load(cls, channel, width));
  Moments before;
  for (std::int64_t cls = 0; cls < classes; ++cls) {
    const Moments own = law.load(cls, channel, width);
    const Moments rest = law.merged(before, after[static_cast<std::size_t>(cls) + 1]);
    double values[pack_lanes];
    select((own.n > 0.0) & (rest.n > 0.0), law.between(own, rest), Pack(not_a_number)).store(values);
    for (int lane = 0; lane < width; ++lane) out[(channel + lane) * classes + cls] = values[lane];
    before = law.merged(before, own);
  }
}

template <typename Law>
void all_pairs(const Law& law, std::int64_t channel, int width, double* out) {
  const std::int64_t classes = law.state.classes;
  const auto set = [&](std::int64_t one, std::int64_t two, const double (&values)[pack_lanes]) {
    for (int lane = 0; lane < width; ++lane)
      out[((channel + lane) * classes + one) * classes + two] =
          out[((channel + lane) * classes + two) * classes + one] = values[lane];
  };
  for (std::int64_t one = 0; one < classes; ++one) {
    const auto own = law.load(one, channel, width);
    double values[pack_lanes];
    select(own.n > 0.0, Pack(0), Pack(not_a_number)).store(values);
    set(one, one, values);
    for (std::int64_t two = one + 1; two < classes; ++two) {
      const auto other = law.load(two, channel, width);
      select((own.n > 0.0) & (other.n > 0.0), law.between(own, other), Pack(not_a_number)).store(values);
      set(one, two, values);
    }
  }
}

// Mean or least over the classes with samples; NaN where there are fewer than two of them, or where a pair's is NaN.
template <typename Law>
void reduced(const Law& law, const std::vector<std::int64_t>& present, std::int64_t channel, int width, double* out,
             std::int64_t* pairs) {
  Pack sum = 0, least = infinity, first = -1, second = -1;
  double number = 0;
  for (std::size_t i = 0; i < present.size(); ++i) {
    const auto own = law.load(present[i], channel, width);
    Pack row = 0;  // summed by rows first: the mean of many pairs keeps its digits
    for (std::size_t j = i + 1; j < present.size(); ++j) {
      const Pack value = law.between(own, law.load(present[j], channel, width));
      row += value;
      const Mask less = value < least;
      least = select(less, value, least);
      first = select(less, Pack(static_cast<double>(present[i])), first);
      second = select(less, Pack(static_cast<double>(present[j])), second);
      ++number;
    }
    sum += row;
  }
  const Mask defined = (sum == sum) & (Pack(number) > 0.0);
  double values[pack_lanes], from[pack_lanes], to[pack_lanes];
  select(defined, pairs ? least : sum / Pack(number), Pack(not_a_number)).store(values);
  select(defined, first, Pack(-1)).store(from);
  select(defined, second, Pack(-1)).store(to);
  for (int lane = 0; lane < width; ++lane) {
    out[channel + lane] = values[lane];
    if (!pairs) continue;
    pairs[2 * (channel + lane)] = static_cast<std::int64_t>(from[lane]);
    pairs[2 * (channel + lane) + 1] = static_cast<std::int64_t>(to[lane]);
  }
}

// ---- launcher -------------------------------------------------------------------------------------------------------

template <typename Law>
void run(const Law& law, Comparison comparison, double* out, std::int64_t* pairs, int threads) {
  const std::int64_t classes = law.state.classes, channels = law.state.channels;
  std::vector<std::int64_t> present;
  for (std::int64_t cls = 0; cls < classes; ++cls)
    if (law.state.count[cls] > 0) present.push_back(cls);
  const std::int64_t comparisons = comparison == Comparison::with_rest ? classes : classes * (classes - 1) / 2;
  parallel_for((channels + group - 1) / group, grain / (comparisons + 1) / group, threads,
               [&](std::int64_t begin, std::int64_t end) {
                 const std::int64_t last = std::min(end * group, channels);
                 for (std::int64_t channel = begin * group; channel < last; channel += pack_lanes) {
                   const int width = static_cast<int>(std::min<std::int64_t>(pack_lanes, last - channel));
                   if (comparison == Comparison::with_rest) with_rest(law, channel, width, out);
                   else if (comparison == Comparison::all_pairs) all_pairs(law, channel, width, out);
                   else reduced(law, present, channel, width, out, comparison == Comparison::least ? pairs : nullptr);
                 }
               });
}

}  // namespace

// ---- dispatch -------------------------------------------------------------------------------------------------------

void one_vs_one(const MomentState& state, const Rule& rule, Witness witness, Comparison comparison, double* out,
                std::int64_t* pairs, int threads) {
  run(ScalarLaw{state, rule, witness}, comparison, out, pairs, threads);
}

void one_vs_one_vector(const VectorState& state, const Rule& rule, Comparison comparison, double* out,
                       std::int64_t* pairs, int threads) {
  run(VectorLaw{state, rule}, comparison, out, pairs, threads);
}

}  // namespace discedit::DISCEDIT_LEVEL
