#include "sample_order.hpp"

#include <algorithm>
#include <numeric>
#include <stdexcept>
#include <string>

namespace discedit {

SampleOrder order_by_class(const Labels& labels, std::int64_t classes) {
  for (std::int64_t i = 0; i < labels.samples; ++i)
    if (labels.data[i] < 0 || labels.data[i] >= classes)
      throw std::invalid_argument("class_moments: labels must lie in 0.." + std::to_string(classes - 1) +
                                  " (num_classes=" + std::to_string(classes) + "), found " +
                                  std::to_string(labels.data[i]) + " at position " + std::to_string(i) + ".");
  SampleOrder sorted;
  sorted.order.resize(static_cast<std::size_t>(labels.samples));
  std::iota(sorted.order.begin(), sorted.order.end(), std::int64_t{0});
  std::stable_sort(sorted.order.begin(), sorted.order.end(),
                   [&](std::int64_t a, std::int64_t b) { return labels.data[a] < labels.data[b]; });
  for (std::int64_t i = 0; i < labels.samples; ++i) {
    const std::int64_t cls = labels.data[sorted.order[static_cast<std::size_t>(i)]];
    if (sorted.groups.empty() || sorted.groups.back().cls != cls) sorted.groups.push_back({cls, i, i});
    sorted.groups.back().end = i + 1;
  }
  return sorted;
}

}  // namespace discedit
