// Exact merge of two states, class by class.
#include "merge_moments.hpp"

namespace discedit {

void merge_moments(const MomentState& into, const MomentState& from) {
  for (std::int64_t cls = 0; cls < into.classes; ++cls) {
    if (from.count[cls] == 0) continue;
    for (std::int64_t channel = 0; channel < into.channels; ++channel)
      into.put(cls, channel, merge(into.at(cls, channel), from.at(cls, channel)));
    into.count[cls] += from.count[cls];
  }
}

}  // namespace discedit
