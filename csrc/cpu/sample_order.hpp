// The samples of a batch, brought together by class.
#pragma once

#include <cstdint>
#include <vector>

#include "class_moments.hpp"

namespace discedit {

struct SampleOrder {
  struct Group {
    std::int64_t cls, begin, end;  // samples order[begin..end) are of class cls
  };
  std::vector<std::int64_t> order;  // sample indices, by class; within a class as in the batch
  std::vector<Group> groups;        // of the classes that occur, ascending
};

// Throws std::invalid_argument for a label outside [0, classes).
SampleOrder order_by_class(const Labels& labels, std::int64_t classes);

}  // namespace discedit
