// Module discedit._cpu: arrays in, arrays written in place. Shapes are checked here, so that a caller without the
// Python layer cannot make an op read or write outside its arrays; Python owns every output.
#include <pybind11/pybind11.h>

#include <memory>

#include "../cpu/bounds.hpp"
#include "../cpu/class_moments.hpp"
#include "../cpu/dispatch.hpp"
#include "../cpu/merge_moments.hpp"
#include "../cpu/one_vs_rest.hpp"
#include "../cpu/pool.hpp"
#include "array.hpp"

namespace discedit {
namespace {

Bound bound_named(const std::string& name) {
  if (name == "fisher") return Bound::fisher;
  if (name == "minimax") return Bound::minimax;
  throw py::value_error("bound must be 'fisher' or 'minimax', got '" + name + "'.");
}

Witness witness_named(const std::string& name) {
  if (name == "linear") return Witness::linear;
  if (name == "quadratic") return Witness::quadratic;
  throw py::value_error("witness must be 'linear' or 'quadratic', got '" + name + "'.");
}

void check_map(const TensorView& x, int channel_axis, const char* op) {
  if (x.axes < 2 || channel_axis < 1 || channel_axis >= x.axes)
    throw py::value_error(std::string(op) + ": channel_axis must lie in 1.." + std::to_string(x.axes - 1) +
                          " for x of shape " + x.shape_text() + ", got " + std::to_string(channel_axis) + ".");
}

// The five arrays of one layer's state, borrowed together.
class State {
 public:
  State(const py::object& count, const py::object& mean, const py::object& m2, const py::object& m3,
        const py::object& m4, const char* op, bool written)
      : count_(count, op, "count", written),
        mean_(mean, op, "mean", written),
        m2_(m2, op, "m2", written),
        m3_(m3, op, "m3", written),
        m4_(m4, op, "m4", written) {
    if (mean_.view.axes != 2)
      throw py::value_error(std::string(op) + ": mean must have shape (classes, channels), got " +
                            mean_.view.shape_text() + ".");
    view.classes = mean_.view.shape[0];
    view.channels = mean_.view.shape[1];
    const std::int64_t size = view.classes * view.channels;
    view.count = contiguous_data<std::int64_t>(count_.view, view.classes, op, "count");
    view.mean = contiguous_data<double>(mean_.view, size, op, "mean");
    view.m2 = contiguous_data<double>(m2_.view, size, op, "m2");
    view.m3 = contiguous_data<double>(m3_.view, size, op, "m3");
    view.m4 = contiguous_data<double>(m4_.view, size, op, "m4");
  }
  MomentState view{};

 private:
  Array count_, mean_, m2_, m3_, m4_;
};

void bind_pool(const py::object& x, int channel_axis, const py::object& out, int threads) {
  const Array map(x, "pool", "x"), result(out, "pool", "out", true);
  check_map(map.view, channel_axis, "pool");
  double* data = contiguous_data<double>(result.view, map.view.shape[0] * map.view.shape[channel_axis], "pool", "out");
  const py::gil_scoped_release release;
  pool_mean(map.view, channel_axis, data, threads);
}

void bind_class_moments(const py::object& x, int channel_axis, const py::object& labels, const py::object& count,
                        const py::object& mean, const py::object& m2, const py::object& m3, const py::object& m4,
                        int threads) {
  const Array map(x, "class_moments", "x"), classes(labels, "class_moments", "labels");
  const State state(count, mean, m2, m3, m4, "class_moments", true);
  check_map(map.view, channel_axis, "class_moments");
  if (map.view.shape[channel_axis] != state.view.channels)
    throw py::value_error("class_moments: the state must hold " + std::to_string(map.view.shape[channel_axis]) +
                          " channels like x, got " + std::to_string(state.view.channels) + ".");
  const auto* label = contiguous_data<std::int64_t>(classes.view, map.view.shape[0], "class_moments", "labels");
  const py::gil_scoped_release release;
  class_moments(map.view, channel_axis, label, state.view, threads);
}

void bind_merge_moments(const py::tuple& into, const py::tuple& from) {
  if (into.size() != 5 || from.size() != 5)
    throw py::value_error("merge_moments: each state must be a tuple (count, mean, m2, m3, m4).");
  const State a(into[0], into[1], into[2], into[3], into[4], "merge_moments", true);
  const State b(from[0], from[1], from[2], from[3], from[4], "merge_moments", false);
  if (a.view.classes != b.view.classes || a.view.channels != b.view.channels)
    throw py::value_error("merge_moments: the states must have the same shape.");
  const py::gil_scoped_release release;
  merge_moments(a.view, b.view);
}

void bind_one_vs_rest(const py::object& count, const py::object& mean, const py::object& m2, const py::object& m3,
                      const py::object& m4, const std::string& bound, const std::string& witness, const py::object& out,
                      int threads) {
  const State state(count, mean, m2, m3, m4, "one_vs_rest", false);
  const Array result(out, "one_vs_rest", "out", true);
  double* data = contiguous_data<double>(result.view, state.view.classes * state.view.channels, "one_vs_rest", "out");
  const Bound which = bound_named(bound);
  const Witness features = witness_named(witness);
  const py::gil_scoped_release release;
  one_vs_rest(state.view, which, features, data, threads);
}

void bind_bound(const std::string& bound, const py::object& mean1, const py::object& cov1, const py::object& mean2,
                const py::object& cov2, const py::object& out, int threads) {
  const char* op = "bound";
  const Bound which = bound_named(bound);
  const Array a(mean1, op, "mean1"), b(cov1, op, "cov1"), c(mean2, op, "mean2"), e(cov2, op, "cov2");
  const Array result(out, op, "out", true);
  if (a.view.axes != 2 || a.view.shape[1] < 1 || a.view.shape[1] > max_dimension)
    throw py::value_error("bound: mean1 must have shape (pairs, d) with d in 1..32, got " + a.view.shape_text() + ".");
  const std::int64_t pairs = a.view.shape[0], d = a.view.shape[1];
  const auto* first = contiguous_data<double>(a.view, pairs * d, op, "mean1");
  const auto* second = contiguous_data<double>(b.view, pairs * d * d, op, "cov1");
  const auto* third = contiguous_data<double>(c.view, pairs * d, op, "mean2");
  const auto* fourth = contiguous_data<double>(e.view, pairs * d * d, op, "cov2");
  double* data = contiguous_data<double>(result.view, pairs, op, "out");
  const py::gil_scoped_release release;
  batched_bound(which, pairs, static_cast<int>(d), first, second, third, fourth, data, threads);
}

}  // namespace
}  // namespace discedit

PYBIND11_MODULE(_cpu, module) {
  using namespace discedit;
  module.doc() = "CPU core of discedit. Takes DLPack or NumPy arrays and writes into arrays that the caller owns.";
  module.def("instruction_set", &instruction_set, "Instruction set chosen at run time.");
  module.def("pool", &bind_pool, py::arg("x"), py::arg("channel_axis"), py::arg("out"), py::arg("threads") = 1);
  module.def("class_moments", &bind_class_moments, py::arg("x"), py::arg("channel_axis"), py::arg("labels"),
             py::arg("count"), py::arg("mean"), py::arg("m2"), py::arg("m3"), py::arg("m4"), py::arg("threads") = 1);
  module.def("merge_moments", &bind_merge_moments, py::arg("into"), py::arg("other"));
  module.def("one_vs_rest", &bind_one_vs_rest, py::arg("count"), py::arg("mean"), py::arg("m2"), py::arg("m3"),
             py::arg("m4"), py::arg("bound"), py::arg("witness"), py::arg("out"), py::arg("threads") = 1);
  module.def("bound", &bind_bound, py::arg("bound"), py::arg("mean1"), py::arg("cov1"), py::arg("mean2"),
             py::arg("cov2"), py::arg("out"), py::arg("threads") = 1);
}
