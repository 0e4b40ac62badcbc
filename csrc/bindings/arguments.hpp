// What the modules' functions take, read and checked: statistics, bounds, maps and states.
#pragma once

#include <array>
#include <optional>
#include <string>

#include "../common/family.hpp"
#include "../common/moment_state.hpp"
#include "../common/statistics.hpp"
#include "../common/window.hpp"
#include "../common/witness.hpp"
#include "array.hpp"

namespace discedit {

inline Statistics statistics_named(const py::sequence& names, const char* op) {
  Statistics statistics;
  for (const py::handle& item : names) {
    const auto name = py::cast<std::string>(item);
    int found = 0;
    while (found < max_statistics && name != statistic_names[found]) ++found;
    if (found == max_statistics)
      throw py::value_error(std::string(op) + ": statistics must be among mean, sum, l2, rms, absmax, max and " +
                            "positive_fraction, got '" + name + "'.");
    if (statistics.count == max_statistics)
      throw py::value_error(std::string(op) + ": statistics must be at most 7, got " + std::to_string(py::len(names)) +
                            ".");
    statistics.list[statistics.count++] = static_cast<Statistic>(found);
  }
  if (statistics.count == 0) throw py::value_error(std::string(op) + ": statistics must name at least one.");
  return statistics;
}

inline Bound bound_named(const std::string& name) {
  if (name == "fisher") return Bound::fisher;
  if (name == "minimax") return Bound::minimax;
  throw py::value_error("bound must be 'fisher' or 'minimax', got '" + name + "'.");
}

// (name, radius, rho, log_term, low, high), as in common/family.hpp.
inline Rule rule_named(const py::tuple& of) {
  constexpr const char* names[] = {"fisher",    "minimax", "minimax_published", "robust",
                                   "hellinger", "witness", "witness_published", "certified"};
  if (of.size() != 6) throw py::value_error("rule must be (name, radius, rho, log_term, low, high).");
  const auto name = py::cast<std::string>(of[0]);
  for (int i = 0; i < 8; ++i) {
    if (name != names[i]) continue;
    const auto number = [&](int at) { return py::cast<double>(of[static_cast<std::size_t>(at)]); };
    return {static_cast<Member>(i), number(1), number(2), number(3), number(4), number(5)};
  }
  throw py::value_error("rule must name a member of the family of bounds, got '" + name + "'.");
}

// Pairs of laws, borrowed: means (pairs, d) and covariances (pairs, d, d), float64.
struct ExplicitLaws {
  ExplicitLaws(const py::object& a, const py::object& b, const py::object& c, const py::object& e, const char* op,
               int most, Memory memory = Memory::host)
      : arrays{Array(a, op, "mean1", false, memory), Array(b, op, "cov1", false, memory),
               Array(c, op, "mean2", false, memory), Array(e, op, "cov2", false, memory)} {
    const TensorView& first = arrays[0].view;
    if (first.axes != 2 || first.shape[1] < 1 || first.shape[1] > most)
      throw py::value_error(std::string(op) + ": mean1 must have shape (pairs, d) with d in 1.." +
                            std::to_string(most) + ", got " + first.shape_text() + ".");
    pairs = first.shape[0];
    d = static_cast<int>(first.shape[1]);
    mean1 = contiguous_data<double>(first, pairs * d, op, "mean1");
    cov1 = contiguous_data<double>(arrays[1].view, pairs * d * d, op, "cov1");
    mean2 = contiguous_data<double>(arrays[2].view, pairs * d, op, "mean2");
    cov2 = contiguous_data<double>(arrays[3].view, pairs * d * d, op, "cov2");
  }
  Array arrays[4];
  std::int64_t pairs;
  int d;
  const double *mean1, *cov1, *mean2, *cov2;
};

inline void check_map(const TensorView& x, int channel_axis, const char* op) {
  if (x.axes < 2 || channel_axis < 1 || channel_axis >= x.axes)
    throw py::value_error(std::string(op) + ": channel_axis must lie in 1.." + std::to_string(x.axes - 1) +
                          " for x of shape " + x.shape_text() + ", got " + std::to_string(channel_axis) + ".");
  if (x.shape[0] != 0 && x.shape[channel_axis] != 0 && x.size() == 0)
    throw py::value_error(std::string(op) + ": x must have at least one element per map, got shape " + x.shape_text() +
                          ".");
}

using Pair = std::array<int, 2>;

// What a convolution reads of a map.
struct Patches {
  Patches(const TensorView& x, Pair kernel, Pair stride, std::array<int, 4> padding, Pair dilation, const char* op) {
    if (x.axes != 4)
      throw py::value_error(std::string(op) + ": x must have shape (samples, channels, height, width), got " +
                            x.shape_text() + ".");
    check_map(x, 1, op);
    for (std::size_t i = 0; i < 2; ++i) {
      Window& window = i == 0 ? rows : columns;
      window = {kernel[i], stride[i], padding[2 * i], padding[2 * i + 1], dilation[i], x.shape[2 + i]};
      if (window.kernel < 1 || window.stride < 1 || window.before < 0 || window.after < 0 || window.dilation < 1)
        throw py::value_error(std::string(op) + ": kernel, stride and dilation must be at least 1 and padding at " +
                              "least 0 on each axis.");
      if (window.padded() > Window::largest || window.extent() > window.padded())
        throw py::value_error(std::string(op) + ": kernel must fit into the padded map, which must be at most " +
                              std::to_string(Window::largest) + " wide and high: it covers " +
                              std::to_string(window.extent()) + " of " + std::to_string(window.padded()) + " on axis " +
                              std::to_string(2 + i) + ".");
    }
  }
  std::int64_t positions() const { return rows.outputs() * columns.outputs(); }

  Window rows, columns;
};

// One layer's state, borrowed: (count, mean, m2, m3, m4) of a scalar statistic or (count, mean, scatter) of a vector.
class State {
 public:
  State(const py::tuple& arrays, const char* op, bool written, Memory memory = Memory::host) {
    constexpr const char* of_scalar[] = {"count", "mean", "m2", "m3", "m4"};
    constexpr const char* of_vector[] = {"count", "mean", "scatter"};
    vector_ = arrays.size() == 3;
    if (!vector_ && arrays.size() != 5)
      throw py::value_error(std::string(op) + ": a state must be a tuple (count, mean, m2, m3, m4) or " +
                            "(count, mean, scatter), got " + std::to_string(arrays.size()) + " entries.");
    for (std::size_t i = 0; i < arrays.size(); ++i)
      arrays_[i].emplace(py::reinterpret_borrow<py::object>(arrays[i]), op, (vector_ ? of_vector : of_scalar)[i],
                         written, memory);
    for (std::size_t i = 1; i < arrays.size(); ++i) common_device(op, {&*arrays_[0], &*arrays_[i]});
    const TensorView& mean = arrays_[1]->view;
    if (mean.axes != (vector_ ? 3 : 2))
      throw py::value_error(std::string(op) + ": mean must have shape " +
                            (vector_ ? "(d, classes, channels)" : "(classes, channels)") + ", got " +
                            mean.shape_text() + ".");
    classes = mean.shape[mean.axes - 2];
    channels = mean.shape[mean.axes - 1];
    const std::int64_t size = classes * channels;
    auto* count = contiguous_data<std::int64_t>(arrays_[0]->view, classes, op, "count");
    if (vector_) {
      if (mean.shape[0] < 1 || mean.shape[0] > max_vector)
        throw py::value_error(std::string(op) + ": mean must have shape (d, classes, channels) with d in 1..8, got " +
                              mean.shape_text() + ".");
      const int d = static_cast<int>(mean.shape[0]);
      of_vector_ = {d,
                    classes,
                    channels,
                    count,
                    contiguous_data<double>(mean, d * size, op, "mean"),
                    contiguous_data<double>(arrays_[2]->view, lower(d, 0) * size, op, "scatter")};
    } else {
      of_scalar_ = {classes,
                    channels,
                    count,
                    contiguous_data<double>(mean, size, op, "mean"),
                    contiguous_data<double>(arrays_[2]->view, size, op, "m2"),
                    contiguous_data<double>(arrays_[3]->view, size, op, "m3"),
                    contiguous_data<double>(arrays_[4]->view, size, op, "m4")};
    }
  }

  std::int64_t classes, channels;
  const VectorState* vector() const { return vector_ ? &of_vector_ : nullptr; }
  const MomentState& scalar() const { return of_scalar_; }
  int dimension() const { return vector_ ? of_vector_.dimension : 0; }  // 0: scalar
  const Array& count() const { return *arrays_[0]; }                    // all arrays are on its device

 private:
  std::optional<Array> arrays_[5];
  bool vector_;
  MomentState of_scalar_{};
  VectorState of_vector_{};
};

// The witness of a scalar state; a vector state's is the vector itself.
inline Witness witness_named(const std::string& name, const State& state, const char* op) {
  if (name == "vector" && state.vector()) return Witness::linear;
  if (name == "linear" && !state.vector()) return Witness::linear;
  if (name == "quadratic" && !state.vector()) return Witness::quadratic;
  throw py::value_error(std::string(op) + ": witness must be " +
                        (state.vector() ? "'vector' for a vector state" : "'linear' or 'quadratic'") + ", got '" +
                        name + "'.");
}

inline void check_state(const State& state, std::int64_t channels, std::int64_t statistics, const char* op) {
  if (state.channels != channels)
    throw py::value_error(std::string(op) + ": the state must hold " + std::to_string(channels) +
                          " channels like x, got " + std::to_string(state.channels) + ".");
  const std::int64_t dimension = state.vector() ? state.vector()->dimension : 1;
  if (dimension != statistics)
    throw py::value_error(std::string(op) + ": the state must hold " + std::to_string(statistics) +
                          " statistics, got " + std::to_string(dimension) + ".");
}

}  // namespace discedit
