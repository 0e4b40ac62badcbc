// The ops at each instruction set, and the choice between them at run time.
//
// The sources of the ops are compiled once per instruction set, into a namespace of its name. Baseline objects come
// first when linking, so that inline functions that several levels share are the baseline's.
#pragma once

#include "bounds.hpp"
#include "class_moments.hpp"
#include "merge_moments.hpp"
#include "one_vs_one.hpp"
#include "one_vs_rest.hpp"
#include "pairwise_min.hpp"
#include "patch_moments.hpp"
#include "pool.hpp"

namespace discedit {

struct Ops {
  const char* instruction_set;
  Pool* pool;
  ClassMoments* class_moments;
  ClassVectorMoments* class_vector_moments;
  FoldMoments* fold_moments;
  FoldVectorMoments* fold_vector_moments;
  MergeMoments* merge_moments;
  MergeVectorMoments* merge_vector_moments;
  PatchMoments* patch_moments;
  OneVsRest* one_vs_rest;
  OneVsRestVector* one_vs_rest_vector;
  PairwiseMin* pairwise_min;
  PairwiseMinVector* pairwise_min_vector;
  BatchedBound* batched_bound;
  BatchedMember* batched_member;
  BatchedWitness* batched_witness;
  OneVsOne* one_vs_one;
  OneVsOneVector* one_vs_one_vector;
};

// The fastest that this machine runs, or the one that the environment variable DISCEDIT_INSTRUCTION_SET names. Throws
// std::invalid_argument where that is unknown or cannot run here.
const Ops& ops();

#define DISCEDIT_DECLARE_OPS(level)        \
  namespace level {                        \
  Pool pool;                               \
  ClassMoments class_moments;              \
  ClassVectorMoments class_vector_moments; \
  FoldMoments fold_moments;                \
  FoldVectorMoments fold_vector_moments;   \
  MergeMoments merge_moments;              \
  MergeVectorMoments merge_vector_moments; \
  PatchMoments patch_moments;              \
  OneVsRest one_vs_rest;                   \
  OneVsRestVector one_vs_rest_vector;      \
  PairwiseMin pairwise_min;                \
  PairwiseMinVector pairwise_min_vector;   \
  BatchedBound batched_bound;              \
  BatchedMember batched_member;            \
  BatchedWitness batched_witness;          \
  OneVsOne one_vs_one;                     \
  OneVsOneVector one_vs_one_vector;        \
  }
DISCEDIT_DECLARE_OPS(baseline)
DISCEDIT_DECLARE_OPS(avx2)
DISCEDIT_DECLARE_OPS(avx512)
#undef DISCEDIT_DECLARE_OPS

}  // namespace discedit
