import warnings
from importlib.util import find_spec

import pytest
import torch

from discedit import backends, ops
from discedit.cli.main import doctor

MAP = torch.ones(2, 3, 2, 2)


@pytest.fixture
def without_extension(monkeypatch):
    """As if discedit had been installed where there is no C++ compiler."""
    monkeypatch.setattr(backends.extensions, "cpu_module", lambda: (None, "not built: no C++ compiler found"))
    backends._warn_of_fallback.cache_clear()
    yield
    backends._warn_of_fallback.cache_clear()


def test_the_extension_is_built_here():
    """CI must never pass on the fallback alone."""
    module, reason = backends.extensions.cpu_module()
    assert module is not None, reason
    assert module.instruction_set() in ("avx512", "avx2", "neon", "baseline")


def test_auto_takes_cpp_on_cpu(monkeypatch):
    called = []
    real = backends.IMPLEMENTATIONS["cpp"]["pool"]
    monkeypatch.setitem(backends.IMPLEMENTATIONS["cpp"], "pool", lambda *a: called.append(1) or real(*a))
    ops.pool(MAP)
    assert called == [1]


def test_auto_falls_back_and_says_so_once(without_extension):
    with pytest.warns(RuntimeWarning, match=r"discedit._cpu not built: no C\+\+ compiler found; running on the slower"):
        assert ops.pool(MAP).tolist() == [[1, 1, 1]] * 2
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ops.pool(MAP)


def test_a_named_backend_never_falls_back(without_extension):
    with pytest.raises(
        RuntimeError, match=r"pool: backend 'cpp' cannot run: discedit._cpu not built: no C\+\+ compiler"
    ):
        ops.pool(MAP, backend="cpp")


@pytest.mark.parametrize("backend", ["cuda", "triton"])
@pytest.mark.parametrize("op", backends.OPS)
def test_missing_kernels_are_named(backend, op):
    if op not in backends.IMPLEMENTATIONS[backend]:
        why = f"this version of discedit has no {backend} implementation of {op}"
    elif backend == "cuda" and backends.extensions.cuda_module()[0] is None:
        why = r"discedit\._cuda (was not built|not built: .*|cannot be imported: .*)"
    else:
        why = ".* these are on meta"
    with pytest.raises(RuntimeError, match=rf"{op}: backend '{backend}' cannot run: {why}\."):
        backends.select(op, backend, torch.device("meta"))


def test_auto_never_takes_the_interpreter():
    assert backends.triton_interprets() or torch.cuda.is_available() or find_spec("triton") is None
    for op in backends.OPS:
        chosen = backends.select(op, "auto", torch.device("cpu"))
        assert chosen is backends.IMPLEMENTATIONS["cpp"][op]


def test_auto_goes_on_where_a_backend_ends():
    law = torch.zeros(1, 3), torch.eye(3)[None], torch.ones(1, 3), torch.eye(3)[None]
    with pytest.raises(RuntimeError, match="'triton' cannot run: its bounds go up to 2 dimensions, these have 3"):
        ops.fisher_bound(*law, backend="triton")
    assert backends.select("fisher_bound", "auto", torch.device("cpu"), 3)(*law).shape == (1,)


def test_other_devices_are_not_for_cpp():
    with pytest.raises(RuntimeError, match="backend 'cpp' cannot run: it takes CPU tensors, and these are on meta"):
        ops.pool(MAP.to("meta"), backend="cpp")


def test_unknown_backend():
    with pytest.raises(ValueError, match=r"pool: backend must be one of 'auto', 'cpp', .* got 'cuad'"):
        ops.pool(MAP, backend="cuad")


def test_every_op_has_a_reference_and_a_kernel():
    for op in backends.OPS:
        assert op in backends.IMPLEMENTATIONS["cpp"]
        assert op in backends.IMPLEMENTATIONS["reference"]
        assert callable(getattr(ops, op))
    for step in backends.STEPS:
        assert step in backends.IMPLEMENTATIONS["cpp"]
        assert step in backends.IMPLEMENTATIONS["reference"]


def test_doctor_tells_what_runs_and_why_not():
    _, report = doctor()
    assert "cpp        runs        discedit._cpu" in report
    assert report.count("one_vs_rest, one_vs_one, pairwise_min, pairwise_mean\n") == 2
    assert "cuda       cannot run  discedit._cuda" in report
    assert "triton     cannot run" in report
    assert "reference  runs" in report


def test_doctor_lists_no_op_that_a_backend_lacks(monkeypatch):
    """As if there were a GPU and kernels for it."""
    monkeypatch.setattr(backends.extensions, "cuda_module", lambda: (object(), ""))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "GPU")
    for backend in backends.status():
        has = backend.name != "triton" or find_spec("triton") is not None
        assert set(backend.ops) == (set(backends.OPS) & set(backends.IMPLEMENTATIONS[backend.name]) if has else set())
    assert "one_vs_one" not in next(backend for backend in backends.status() if backend.name == "cuda").ops


def test_doctor_without_extension(without_extension):
    assert "cpp        cannot run  discedit._cpu not built: no C++ compiler found" in doctor()[1]
