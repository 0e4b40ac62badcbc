// Module discedit._cpu: arrays in, arrays written in place. Shapes are checked here, so that a caller without the
// Python layer cannot make an op read or write outside its arrays; Python owns every output.
#include <pybind11/pybind11.h>

#include <optional>

#include "../cpu/dispatch.hpp"
#include "array.hpp"

namespace discedit {
namespace {

constexpr const char* statistic_names[] = {"mean", "sum", "l2", "rms", "absmax", "max", "positive_fraction"};

Statistics statistics_named(const py::sequence& names, const char* op) {
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

Bound bound_named(const std::string& name) {
  if (name == "fisher") return Bound::fisher;
  if (name == "minimax") return Bound::minimax;
  throw py::value_error("bound must be 'fisher' or 'minimax', got '" + name + "'.");
}

void check_map(const TensorView& x, int channel_axis, const char* op) {
  if (x.axes < 2 || channel_axis < 1 || channel_axis >= x.axes)
    throw py::value_error(std::string(op) + ": channel_axis must lie in 1.." + std::to_string(x.axes - 1) +
                          " for x of shape " + x.shape_text() + ", got " + std::to_string(channel_axis) + ".");
  if (x.shape[0] != 0 && x.shape[channel_axis] != 0 && x.size() == 0)
    throw py::value_error(std::string(op) + ": x must have at least one element per map, got shape " + x.shape_text() +
                          ".");
}

// One layer's state, borrowed: (count, mean, m2, m3, m4) of a scalar statistic or (count, mean, scatter) of a vector.
class State {
 public:
  State(const py::tuple& arrays, const char* op, bool written) {
    constexpr const char* of_scalar[] = {"count", "mean", "m2", "m3", "m4"};
    constexpr const char* of_vector[] = {"count", "mean", "scatter"};
    vector_ = arrays.size() == 3;
    if (!vector_ && arrays.size() != 5)
      throw py::value_error(std::string(op) + ": a state must be a tuple (count, mean, m2, m3, m4) or " +
                            "(count, mean, scatter), got " + std::to_string(arrays.size()) + " entries.");
    for (std::size_t i = 0; i < arrays.size(); ++i)
      arrays_[i].emplace(py::reinterpret_borrow<py::object>(arrays[i]), op, (vector_ ? of_vector : of_scalar)[i],
                         written);
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

 private:
  std::optional<Array> arrays_[5];
  bool vector_;
  MomentState of_scalar_{};
  VectorState of_vector_{};
};

// The witness of a scalar state; a vector state's is the vector itself.
Witness witness_named(const std::string& name, const State& state, const char* op) {
  if (name == "vector" && state.vector()) return Witness::linear;
  if (name == "linear" && !state.vector()) return Witness::linear;
  if (name == "quadratic" && !state.vector()) return Witness::quadratic;
  throw py::value_error(std::string(op) + ": witness must be " +
                        (state.vector() ? "'vector' for a vector state" : "'linear' or 'quadratic'") + ", got '" +
                        name + "'.");
}

void bind_pool(const py::object& x, int channel_axis, const py::sequence& statistics, const py::object& out,
               int threads) {
  const Array map(x, "pool", "x"), result(out, "pool", "out", true);
  check_map(map.view, channel_axis, "pool");
  const Statistics wanted = statistics_named(statistics, "pool");
  const std::int64_t channels = map.view.shape[channel_axis], plane = map.view.shape[0] * channels;
  double* data = contiguous_data<double>(result.view, wanted.count * plane, "pool", "out");
  const py::gil_scoped_release release;
  ops().pool(map.view, channel_axis, wanted, {data, channels, plane}, threads);
}

void check_state(const State& state, std::int64_t channels, std::int64_t statistics, const char* op) {
  if (state.channels != channels)
    throw py::value_error(std::string(op) + ": the state must hold " + std::to_string(channels) +
                          " channels like x, got " + std::to_string(state.channels) + ".");
  const std::int64_t dimension = state.vector() ? state.vector()->dimension : 1;
  if (dimension != statistics)
    throw py::value_error(std::string(op) + ": the state must hold " + std::to_string(statistics) +
                          " statistics, got " + std::to_string(dimension) + ".");
}

void bind_class_moments(const py::object& x, int channel_axis, const py::sequence& statistics, double scale,
                        const py::object& labels, const py::tuple& state, int threads) {
  const char* op = "class_moments";
  const Array map(x, op, "x"), classes(labels, op, "labels");
  const State into(state, op, true);
  check_map(map.view, channel_axis, op);
  const Statistics wanted = statistics_named(statistics, op);
  check_state(into, map.view.shape[channel_axis], wanted.count, op);
  const std::int64_t samples = map.view.shape[0];
  const Labels given{contiguous_data<std::int64_t>(classes.view, samples, op, "labels"), samples};
  const py::gil_scoped_release release;
  if (into.vector()) ops().class_vector_moments(map.view, channel_axis, wanted, given, *into.vector(), threads);
  else ops().class_moments(map.view, channel_axis, wanted.list[0], scale, given, into.scalar(), threads);
}

void bind_fold_moments(const py::object& pooled, double scale, const py::object& labels, const py::tuple& state,
                       int threads) {
  const char* op = "fold_moments";
  const Array features(pooled, op, "pooled"), classes(labels, op, "labels");
  const State into(state, op, true);
  if (features.view.axes != 3)
    throw py::value_error("fold_moments: pooled must have shape (statistics, samples, channels), got " +
                          features.view.shape_text() + ".");
  check_state(into, features.view.shape[2], features.view.shape[0], op);
  const std::int64_t samples = features.view.shape[1];
  const Planes<const double> planes{contiguous_data<double>(features.view, features.view.size(), op, "pooled"),
                                    into.channels, samples * into.channels};
  const Labels given{contiguous_data<std::int64_t>(classes.view, samples, op, "labels"), samples};
  const py::gil_scoped_release release;
  if (into.vector()) ops().fold_vector_moments(planes, given, *into.vector(), threads);
  else ops().fold_moments(planes, scale, given, into.scalar(), threads);
}

void bind_merge_moments(const py::tuple& into, const py::tuple& other, int threads) {
  const State a(into, "merge_moments", true), b(other, "merge_moments", false);
  const auto dimension = [](const State& state) { return state.vector() ? state.vector()->dimension : 0; };
  if (a.classes != b.classes || a.channels != b.channels || dimension(a) != dimension(b))
    throw py::value_error("merge_moments: the states must have the same kind and shape.");
  const py::gil_scoped_release release;
  if (a.vector()) ops().merge_vector_moments(*a.vector(), *b.vector(), threads);
  else ops().merge_moments(a.scalar(), b.scalar(), threads);
}

void bind_one_vs_rest(const py::tuple& state, const std::string& bound, const std::string& witness,
                      const py::object& out, int threads) {
  const char* op = "one_vs_rest";
  const State moments(state, op, false);
  const Array result(out, op, "out", true);
  double* data = contiguous_data<double>(result.view, moments.classes * moments.channels, op, "out");
  const Bound which = bound_named(bound);
  const Witness features = witness_named(witness, moments, op);
  const py::gil_scoped_release release;
  if (moments.vector()) ops().one_vs_rest_vector(*moments.vector(), which, data, threads);
  else ops().one_vs_rest(moments.scalar(), which, features, data, threads);
}

void bind_pairwise_min(const py::tuple& state, const std::string& bound, const std::string& witness,
                       const py::object& values, const py::object& pairs, int threads) {
  const char* op = "pairwise_min";
  const State moments(state, op, false);
  const Array smallest(values, op, "values", true), classes(pairs, op, "pairs", true);
  double* value = contiguous_data<double>(smallest.view, moments.channels, op, "values");
  auto* pair = contiguous_data<std::int64_t>(classes.view, 2 * moments.channels, op, "pairs");
  const Bound which = bound_named(bound);
  const Witness features = witness_named(witness, moments, op);
  const py::gil_scoped_release release;
  if (moments.vector()) ops().pairwise_min_vector(*moments.vector(), which, value, pair, threads);
  else ops().pairwise_min(moments.scalar(), which, features, value, pair, threads);
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
  ops().batched_bound(which, pairs, static_cast<int>(d), first, second, third, fourth, data, threads);
}

}  // namespace
}  // namespace discedit

PYBIND11_MODULE(_cpu, module) {
  using namespace discedit;
  const auto threads = py::arg("threads") = 1;
  module.doc() = "CPU core of discedit. Takes DLPack or NumPy arrays and writes into arrays that the caller owns.";
  ops();  // an instruction set that cannot run here must fail now, not in the middle of a pass
  module.def("instruction_set", [] { return ops().instruction_set; }, "Instruction set in use.");
  module.def("pool", &bind_pool, py::arg("x"), py::arg("channel_axis"), py::arg("statistics"), py::arg("out"), threads);
  module.def("class_moments", &bind_class_moments, py::arg("x"), py::arg("channel_axis"), py::arg("statistics"),
             py::arg("scale"), py::arg("labels"), py::arg("state"), threads);
  module.def("fold_moments", &bind_fold_moments, py::arg("pooled"), py::arg("scale"), py::arg("labels"),
             py::arg("state"), threads);
  module.def("merge_moments", &bind_merge_moments, py::arg("into"), py::arg("other"), threads);
  module.def("one_vs_rest", &bind_one_vs_rest, py::arg("state"), py::arg("bound"), py::arg("witness"), py::arg("out"),
             threads);
  module.def("pairwise_min", &bind_pairwise_min, py::arg("state"), py::arg("bound"), py::arg("witness"),
             py::arg("values"), py::arg("pairs"), threads);
  module.def("bound", &bind_bound, py::arg("bound"), py::arg("mean1"), py::arg("cov1"), py::arg("mean2"),
             py::arg("cov2"), py::arg("out"), threads);
}
