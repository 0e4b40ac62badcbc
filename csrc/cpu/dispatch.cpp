#include "dispatch.hpp"

#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

namespace discedit {
namespace {

#define DISCEDIT_OPS_OF(level, name) \
  {name,                             \
   level::pool,                      \
   level::class_moments,             \
   level::class_vector_moments,      \
   level::fold_moments,              \
   level::fold_vector_moments,       \
   level::merge_moments,             \
   level::merge_vector_moments,      \
   level::patch_moments,             \
   level::one_vs_rest,               \
   level::one_vs_rest_vector,        \
   level::pairwise_min,              \
   level::pairwise_min_vector,       \
   level::batched_bound,             \
   level::batched_member,            \
   level::batched_witness,           \
   level::one_vs_one,                \
   level::one_vs_one_vector}

struct Level {
  Ops ops;
  bool runs;
};

const Ops& choose() {
  // Slowest first.
  static const Level levels[] = {
#if defined(__aarch64__)
      {DISCEDIT_OPS_OF(baseline, "neon"), true},
#else
      {DISCEDIT_OPS_OF(baseline, "baseline"), true},
#endif
#if defined(DISCEDIT_X86_LEVELS)
      // Every processor with AVX2 so far has F16C; only the former can be asked for by name in all compilers.
      {DISCEDIT_OPS_OF(avx2, "avx2"), __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")},
      {DISCEDIT_OPS_OF(avx512, "avx512"), __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                                              __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")},
#endif
  };
  const char* wanted = std::getenv("DISCEDIT_INSTRUCTION_SET");
  const Level* best = &levels[0];
  std::string known;
  for (const Level& level : levels) {
    known += std::string(known.empty() ? "" : ", ") + level.ops.instruction_set;
    if (wanted && *wanted) {
      if (std::strcmp(wanted, level.ops.instruction_set) != 0) continue;
      if (!level.runs)
        throw std::invalid_argument(std::string("DISCEDIT_INSTRUCTION_SET=") + wanted +
                                    ": this processor does not have it.");
      return level.ops;
    }
    if (level.runs) best = &level;
  }
  if (wanted && *wanted)
    throw std::invalid_argument("DISCEDIT_INSTRUCTION_SET must be one of " + known + ", got " + wanted + ".");
  return best->ops;
}

}  // namespace

const Ops& ops() {
  static const Ops& chosen = choose();
  return chosen;
}

}  // namespace discedit
