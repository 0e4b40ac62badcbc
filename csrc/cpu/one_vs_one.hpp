#pragma once

#include "../common/family.hpp"
#include "../common/moment_state.hpp"

namespace discedit {

// What becomes of the comparisons of classes, by any member of the family. NaN where a class has no sample.
enum class Comparison {
  with_rest,  // out[channel * classes + class]: each class and the union of the others
  all_pairs,  // out[(channel * classes + class) * classes + other], 0 on the diagonal
  mean,       // out[channel]: over the pairs of classes with samples
  least,      // out[channel], and the first pair that attains it: pairs[2 * channel] < pairs[2 * channel + 1]
};

using OneVsOne = void(const MomentState& state, const Rule& rule, Witness witness, Comparison comparison, double* out,
                      std::int64_t* pairs, int threads);
using OneVsOneVector = void(const VectorState& state, const Rule& rule, Comparison comparison, double* out,
                            std::int64_t* pairs, int threads);

}  // namespace discedit
