// Module discedit._cpu: arrays in, arrays written in place. Shapes are checked here, so that a caller without the
// Python layer cannot make an op read or write outside its arrays; Python owns every output.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "../cpu/dispatch.hpp"
#include "arguments.hpp"

namespace discedit {
namespace {

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

void bind_patch_moments(const py::object& x, std::array<int, 2> kernel, std::array<int, 2> stride,
                        std::array<int, 4> padding, std::array<int, 2> dilation, const py::object& positions,
                        const py::object& mean, const py::object& scatter, int threads) {
  const char* op = "patch_moments";
  const Array map(x, op, "x"), means(mean, op, "mean", true), scatters(scatter, op, "scatter", true);
  const Patches patches(map.view, kernel, stride, padding, dilation, op);
  const std::int64_t taps = patches.rows.kernel * patches.columns.kernel, channels = map.view.shape[1];
  std::optional<Array> chosen;
  Positions places{nullptr, patches.positions()};
  if (!positions.is_none()) {
    chosen.emplace(positions, op, "positions");
    const std::int64_t last = places.count - 1;
    places = {contiguous_data<std::int64_t>(chosen->view, chosen->view.size(), op, "positions"), chosen->view.size()};
    for (std::int64_t i = 0; i < places.count; ++i)
      if (places.list[i] < 0 || places.list[i] > last)
        throw py::value_error("patch_moments: positions must lie in 0.." + std::to_string(last) + ", found " +
                              std::to_string(places.list[i]) + " at position " + std::to_string(i) + ".");
  }
  double* first = contiguous_data<double>(means.view, channels * taps, op, "mean");
  double* second = contiguous_data<double>(scatters.view, channels * taps * taps, op, "scatter");
  const py::gil_scoped_release release;
  ops().patch_moments(map.view, patches.rows, patches.columns, places, first, second, threads);
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
  const ExplicitLaws laws(mean1, cov1, mean2, cov2, op, max_dimension);
  const Array result(out, op, "out", true);
  double* data = contiguous_data<double>(result.view, laws.pairs, op, "out");
  const py::gil_scoped_release release;
  ops().batched_bound(which, laws.pairs, laws.d, laws.mean1, laws.cov1, laws.mean2, laws.cov2, data, threads);
}

void bind_member(const py::tuple& of, const py::object& mean1, const py::object& cov1, const py::object& mean2,
                 const py::object& cov2, const py::object& radius, const py::object& out, int threads) {
  const char* op = "member";
  const Rule rule = rule_named(of);
  if (rule.member >= Member::witness) throw py::value_error("member: this one takes no covariances.");
  const ExplicitLaws laws(mean1, cov1, mean2, cov2, op, max_dimension);
  const Array result(out, op, "out", true);
  std::optional<Array> balls;
  const double* radii = nullptr;
  if (!radius.is_none()) {
    balls.emplace(radius, op, "radius");
    radii = contiguous_data<double>(balls->view, laws.pairs, op, "radius");
  }
  double* data = contiguous_data<double>(result.view, laws.pairs, op, "out");
  const py::gil_scoped_release release;
  ops().batched_member(rule, laws.pairs, laws.d, laws.mean1, laws.cov1, laws.mean2, laws.cov2, radii, data, threads);
}

void bind_witness(bool published, const py::object& mean1, const py::object& second1, const py::object& mean2,
                  const py::object& second2, const py::object& out, int threads) {
  const char* op = "witness";
  const Array a(mean1, op, "mean1"), b(second1, op, "second1"), c(mean2, op, "mean2"), e(second2, op, "second2");
  const Array result(out, op, "out", true);
  const std::int64_t pairs = a.view.size();
  const auto* first = contiguous_data<double>(a.view, pairs, op, "mean1");
  const auto* second = contiguous_data<double>(b.view, pairs, op, "second1");
  const auto* third = contiguous_data<double>(c.view, pairs, op, "mean2");
  const auto* fourth = contiguous_data<double>(e.view, pairs, op, "second2");
  double* data = contiguous_data<double>(result.view, pairs, op, "out");
  const py::gil_scoped_release release;
  ops().batched_witness(published, pairs, first, second, third, fourth, data, threads);
}

void bind_one_vs_one(const py::tuple& state, const py::tuple& of, const std::string& witness,
                     const std::string& comparison, const py::object& out, const py::object& pairs, int threads) {
  const char* op = "one_vs_one";
  const State moments(state, op, false);
  const Rule rule = rule_named(of);
  const Witness features = witness_named(witness, moments, op);
  if (rule.member >= Member::witness && (moments.vector() || features != Witness::linear))
    throw py::value_error("one_vs_one: this bound takes the witness 'linear' alone, got '" + witness + "'.");
  const Array result(out, op, "out", true);
  std::int64_t size = moments.channels;
  Comparison what = Comparison::least;
  if (comparison == "with_rest") what = Comparison::with_rest, size *= moments.classes;
  else if (comparison == "all_pairs") what = Comparison::all_pairs, size *= moments.classes * moments.classes;
  else if (comparison == "mean") what = Comparison::mean;
  else if (comparison != "least")
    throw py::value_error("one_vs_one: comparison must be with_rest, all_pairs, mean or least, got '" + comparison +
                          "'.");
  double* data = contiguous_data<double>(result.view, size, op, "out");
  std::optional<Array> classes;
  std::int64_t* pair = nullptr;
  if (what == Comparison::least) {
    classes.emplace(pairs, op, "pairs", true);
    pair = contiguous_data<std::int64_t>(classes->view, 2 * moments.channels, op, "pairs");
  }
  const py::gil_scoped_release release;
  if (moments.vector()) ops().one_vs_one_vector(*moments.vector(), rule, what, data, pair, threads);
  else ops().one_vs_one(moments.scalar(), rule, features, what, data, pair, threads);
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
  module.def("patch_moments", &bind_patch_moments, py::arg("x"), py::arg("kernel"), py::arg("stride"),
             py::arg("padding"), py::arg("dilation"), py::arg("positions"), py::arg("mean"), py::arg("scatter"),
             threads);
  module.def("one_vs_rest", &bind_one_vs_rest, py::arg("state"), py::arg("bound"), py::arg("witness"), py::arg("out"),
             threads);
  module.def("pairwise_min", &bind_pairwise_min, py::arg("state"), py::arg("bound"), py::arg("witness"),
             py::arg("values"), py::arg("pairs"), threads);
  module.def("bound", &bind_bound, py::arg("bound"), py::arg("mean1"), py::arg("cov1"), py::arg("mean2"),
             py::arg("cov2"), py::arg("out"), threads);
  module.def("member", &bind_member, py::arg("rule"), py::arg("mean1"), py::arg("cov1"), py::arg("mean2"),
             py::arg("cov2"), py::arg("radius"), py::arg("out"), threads);
  module.def("witness", &bind_witness, py::arg("published"), py::arg("mean1"), py::arg("second1"), py::arg("mean2"),
             py::arg("second2"), py::arg("out"), threads);
  module.def("one_vs_one", &bind_one_vs_one, py::arg("state"), py::arg("rule"), py::arg("witness"),
             py::arg("comparison"), py::arg("out"), py::arg("pairs"), threads);
}
