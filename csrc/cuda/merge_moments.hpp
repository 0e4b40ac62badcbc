#pragma once

#include "../common/moment_state.hpp"
#include "stream.hpp"

namespace discedit::cuda {

// Merges `from` into `into`; both have the same classes and channels.
void merge_moments(const MomentState& into, const MomentState& from, Stream stream);
void merge_vector_moments(const VectorState& into, const VectorState& from, Stream stream);

}  // namespace discedit::cuda
