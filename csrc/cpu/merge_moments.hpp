#pragma once

#include "class_moments.hpp"

namespace discedit {

// Merges `from` into `into`; both have the same classes and channels.
void merge_moments(const MomentState& into, const MomentState& from);

}  // namespace discedit
