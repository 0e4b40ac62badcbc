"""The gate of benchmarks/gpu: that nothing which fails, hangs or dies takes a figure along, and that it says so.

Workers of these tests are processes like the gate's own, with steps that do what a GPU machine may do to them.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch

from benchmarks.gpu import __main__ as gate_program
from benchmarks.gpu import gate, install, plan, programs, report, table

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parent.parent
STEPS = (plan.Step("smoke", 20, ""), plan.Step("ceilings", 20, ""))
FAKE = """
    import json, os, sys, time
    from types import SimpleNamespace
    from benchmarks.gpu.worker import serve

    here = os.path.dirname(__file__)

    class Gpu:
        broken = False
        def wait(self):
            if self.broken:
                raise RuntimeError("CUDA error: an illegal memory access was encountered")

    def case(name, run):
        return SimpleNamespace(facts={"op": name}, run=run)

    def measured(seconds=1.0, **more):
        return lambda: {"seconds": seconds, "bytes": 8, **more}

    def broken():
        bench.gpu.broken = True
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    def on_disk():
        time.sleep(0.5)
        with open(os.path.join(here, "report.json")) as file:
            return {"rows on disk": len(json.load(file)["rows"])}

    bench = SimpleNamespace(gpu=Gpu(), forget=lambda: None)
    # `smoke` is put in here; `ceilings` is what must come whatever `smoke` does.
    SMOKE
    def ceilings(bench):
        yield case("torch.sum", measured(2.0))

    serve(os.fdopen(int(sys.argv[1]), "w"), bench, {"smoke": smoke, "ceilings": ceilings}, {"torch": "none"})
"""


def run(tmp_path, smoke, minutes=6.0, steps=STEPS):
    """The report's content after a run of a fake worker whose step `smoke` is this code."""
    code = textwrap.dedent(FAKE).replace("SMOKE", textwrap.dedent(smoke))
    (tmp_path / "fake_worker.py").write_text(code)
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}"}
    kept = report.Report(tmp_path / "report.json", device="fake")
    said = []
    setting = gate.Setting(environment=environment, folder=tmp_path)
    gate.Gate(kept, setting, minutes, said.append, module="fake_worker").run(steps=steps)
    content = json.loads((tmp_path / "report.json").read_text())
    assert content["rows"] == kept.rows
    return content, kept.failures()


def statuses(content):
    return {row["op"]: row.get("status", "ok") for row in content["rows"] if "op" in row}


def steps_of(content):
    return [(step["step"], step["status"]) for step in content["steps"]]


def test_every_row_is_on_disk_while_the_next_case_runs(tmp_path):
    smoke = """
    def smoke(bench):
        for i in range(4):
            yield case(str(i), on_disk)
    """
    content, failures = run(tmp_path, smoke)
    assert [row["rows on disk"] for row in content["rows"][:4]] == [0, 1, 2, 3]
    assert steps_of(content) == [("smoke", "ok"), ("ceilings", "ok")]
    assert content["torch"] == "none"
    assert not failures


# What happens in the middle of three cases, and what the row of it says.
FATES = {
    "raises": ("lambda: 1 / 0", "ZeroDivisionError"),
    "exits": ("lambda: os._exit(7)", "ended by itself with status 7"),
    "dies": ("lambda: os.kill(os.getpid(), 11)", "ended by itself with status -11"),
    "breaks the device": ("broken", "illegal memory access"),
}


@pytest.mark.parametrize("fate", FATES)
def test_what_fails_takes_nothing_along(tmp_path, fate):
    what, said = FATES[fate]
    smoke = f"""
    def smoke(bench):
        yield case("first", measured())
        yield case("second", {what})
        yield case("third", measured())
    """
    content, failures = run(tmp_path, smoke)
    assert statuses(content) == {"first": "ok", "second": "failed", "third": "ok", "torch.sum": "ok"}
    assert said in content["rows"][1]["traceback"]
    assert steps_of(content) == [("smoke", "failed"), ("ceilings", "ok")]
    assert failures == ["step smoke: failed", "smoke: second: failed"]


def test_what_hangs_is_ended_and_the_next_step_runs(tmp_path, monkeypatch):
    monkeypatch.setattr(gate, "GRACE", 0.5)
    smoke = """
    def smoke(bench):
        yield case("first", measured())
        yield case("second", lambda: time.sleep(1000))
        yield case("third", measured())
    """
    start = time.monotonic()
    steps = (plan.Step("smoke", 1.5, ""), STEPS[1])
    content, _ = run(tmp_path, smoke, steps=steps)
    assert time.monotonic() - start < 15
    assert statuses(content) == {"first": "ok", "second": "failed", "torch.sum": "ok"}
    assert "its time was over" in content["rows"][1]["traceback"]
    assert content["rows"][2]["status"] == "not measured"
    assert steps_of(content) == [("smoke", "failed"), ("ceilings", "ok")]


def test_cases_that_do_not_fit_into_the_budget_are_named(tmp_path):
    smoke = """
    def smoke(bench):
        for name in ("first", "second", "third"):
            yield case(name, lambda: time.sleep(1.2) or {})
    """
    steps = (plan.Step("smoke", 2.0, ""), STEPS[1])
    content, failures = run(tmp_path, smoke, steps=steps)
    assert statuses(content) == {"first": "ok", "second": "not measured", "third": "not measured", "torch.sum": "ok"}
    assert steps_of(content) == [("smoke", "out of budget"), ("ceilings", "ok")]
    assert "smoke: third: not measured" in failures


def test_budgets_shrink_with_the_minutes_and_end_with_them(tmp_path):
    smoke = """
    def smoke(bench):
        yield case("first", lambda: time.sleep(2.5) or {})
    """
    content, _ = run(tmp_path, smoke, minutes=0.05)
    assert content["steps"][0]["budget, s"] == pytest.approx(20 * 0.05 / 6, abs=0.1)
    assert steps_of(content)[1] == ("ceilings", "not started")


@pytest.mark.parametrize(
    ("smoke", "said"),
    [
        ("raise ImportError('no such library')", "no such library"),
        ("def smoke(bench):\n    yield from ()", ""),
        ("def smoke(bench):\n    raise KeyError('in the list of cases')\n    yield", "in the list of cases"),
    ],
    ids=["does not start", "no cases", "no list"],
)
def test_a_step_that_measures_nothing_has_failed(tmp_path, smoke, said):
    content, failures = run(tmp_path, smoke)
    assert content["steps"][0]["status"] == "failed"
    assert said in json.dumps(content)
    assert failures


def test_rates_are_shares_of_the_fastest_plain_read_of_the_run(tmp_path):
    kept = report.Report(tmp_path / "report.json")
    ceilings = kept.begin("ceilings", 10)
    for op, seconds in (("torch.sum", 4.0), ("16-byte loads", 2.0), ("copy", 1.0)):
        kept.add(ceilings, {"op": op, "seconds": seconds, "bytes": 80})
    maps = kept.begin("class_moments", 10)
    kept.add(maps, {"op": "class_moments", "seconds": 0.5, "bytes": 10})
    kept.add(maps, {"op": "class_moments", "status": "failed", "bytes": 10})
    rows = json.loads((tmp_path / "report.json").read_text())["rows"]
    assert rows[3]["of read"] == pytest.approx(0.5)
    assert all("of read" not in row for row in (*rows[:3], rows[4]))


# ---- tests and tools ------------------------------------------------------------------------------------------------


@pytest.fixture
def running(tmp_path):
    """A gate whose programs run in `tmp_path`."""
    setting = gate.Setting(environment={**os.environ, "PYTHONPATH": str(ROOT)}, folder=tmp_path)
    return gate.Gate(report.Report(tmp_path / "report.json"), setting, 6.0, lambda _: None)


def outcomes_of(running, tmp_path, code, processes=2, seconds=60.0, first=None):
    (tmp_path / "test_some.py").write_text(textwrap.dedent(code))
    deadline = time.monotonic() + seconds
    rows = programs.run_tests(running, deadline, [str(tmp_path / "test_some.py")], [], processes, first)
    return {row.get("test", row.get("warning", "")): row for row in rows}


def test_a_test_that_ends_its_process_costs_that_test_alone(running, tmp_path):
    code = """
        import os, warnings
        import pytest

        @pytest.mark.parametrize("i", range(5))
        def test_good(i):
            warnings.warn("of some library")

        def test_bad():
            assert 1 == 2

        @pytest.mark.parametrize("i", range(2))
        def test_dies(i):
            print("last words")
            os.kill(os.getpid(), 11)

        @pytest.mark.skip(reason="no device")
        def test_left_out(): ...
    """
    rows = outcomes_of(running, tmp_path, code)
    found = {name: row["status"] for name, row in rows.items() if name.startswith("test")}
    good = {f"test_good[{i}]": "ok" for i in range(5)}
    died = {f"test_dies[{i}]": "failed" for i in range(2)}
    assert found == {**good, **died, "test_bad": "failed", "test_left_out": "skipped"}
    assert "assert 1 == 2" in rows["test_bad"]["traceback"]
    assert "status -11" in rows["test_dies[1]"]["traceback"]
    assert "UserWarning: of some library" in rows


def test_a_test_that_leaves_the_device_useless_costs_that_test_alone(running, tmp_path):
    code = """
        from benchmarks.gpu import shard

        def test_good(): ...

        def test_bad():
            shard._works = lambda: False
            assert 1 == 2

        def test_behind(): ...
    """
    rows = outcomes_of(running, tmp_path, code, processes=1)
    assert {name: row["status"] for name, row in rows.items()} == {
        "test_good": "ok",
        "test_bad": "failed",
        "test_behind": "ok",
    }


def test_tests_that_hang_are_ended_at_the_deadline(running, tmp_path):
    code = """
        import time

        def test_quick(): ...

        def test_hangs():
            time.sleep(1000)
    """
    rows = outcomes_of(running, tmp_path, code, processes=1, seconds=6.0)
    assert rows["test_quick"]["status"] == "ok"
    assert rows["test_hangs"]["status"] == "not measured"


def test_a_file_of_tests_that_cannot_be_read_is_no_success(running, tmp_path):
    for code, said in (
        ("import no_such_module\n\ndef test_good(): ...\n", "no_such_module"),
        ("", "no test was selected"),
    ):
        (row,) = {row["traceback"]: row for row in outcomes_of(running, tmp_path, code, processes=1).values()}.values()
        assert row["status"] == "failed"
        assert said in row["traceback"]


def test_the_first_cases_of_each_function_and_backend(running, tmp_path):
    code = """
        import pytest

        @pytest.mark.parametrize("x", "abc")
        @pytest.mark.parametrize("backend", ["cuda", "triton"])
        def test_some(backend, x): ...
    """
    rows = outcomes_of(running, tmp_path, code, first=2)
    assert set(rows) == {f"test_some[{backend}-{x}]" for backend in ("cuda", "triton") for x in "ab"}


NCU = """==PROF== Connected to process 1
"ID","Process ID","Kernel Name","gpu__time_duration.sum","launch__registers_per_thread","other.metric"
"","","","usecond","register/thread",""
"0","1","fold(const double *, int)","1,234.5","40","1"
"1","1","void pool_rows<float>(x)","10.0","96","1"
"2","1","void pool_rows<float>(x)","8.5","96","1"
==PROF== Disconnected
"""


def test_what_ncu_prints_becomes_a_row_for_each_kernel():
    rows = list(programs.counted(NCU))
    assert [row["kernel"] for row in rows] == ["fold", "void pool_rows<float>"]
    assert rows[0]["counters"]["gpu__time_duration.sum, usecond"] == 1234.5
    assert rows[1]["counters"] == {
        "gpu__time_duration.sum, usecond": 8.5,
        "launch__registers_per_thread, register/thread": 96.0,
    }
    with pytest.raises(gate.Ended, match="no table"):
        list(programs.counted("==ERROR== no permission to use performance counters"))


# ---- installation and command line ----------------------------------------------------------------------------------


def test_a_wheel_that_does_not_run_gives_way_to_a_build_and_neither_is_an_error(tmp_path, monkeypatch):
    """Both are tried, and each says why it failed."""
    kept = report.Report(tmp_path / "report.json")
    wheel = tmp_path / "discedit-0.1.0-py3-none-any.whl"
    wheel.write_bytes(b"no wheel")
    monkeypatch.setattr(install, "ROOT", tmp_path / "no such source")
    setting = gate.Setting(environment={**os.environ, "PYTHONPATH": str(ROOT)}, folder=tmp_path)
    with pytest.raises(gate.Ended, match="neither"):
        install.install(kept, setting, tmp_path, wheel, "90", lambda _: None)
    content = json.loads((tmp_path / "report.json").read_text())
    assert [row["status"] for row in content["rows"]] == ["failed", "failed"]
    assert [row["op"] for row in content["rows"]] == [f"wheel {wheel.name}", "build for sm_90"]
    assert content["steps"][0]["status"] == "failed"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to measure")
def test_without_a_gpu_nothing_is_installed_or_written(capsys, tmp_path):
    assert gate_program.main(["--out", str(tmp_path / "results")]) == 2
    assert "no CUDA device here; nothing was measured" in capsys.readouterr().err
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--wheel", "no.whl"], "--wheel must name a file, there is none at no.whl"),
        (["--minutes", "0"], "--minutes must be above 0, got 0"),
        (["--steps", "nothing"], "invalid choice: 'nothing'"),
    ],
)
def test_bad_command_lines_are_refused(capsys, given, said):
    with pytest.raises(SystemExit):
        gate_program.main(given)
    assert said in capsys.readouterr().err


def test_the_plan_takes_six_minutes_and_names_every_step():
    assert sum(step.seconds for step in plan.STEPS) == 60 * plan.MINUTES
    assert all(step.estimate for step in plan.STEPS)
    from benchmarks.gpu import figures

    assert [step.name for step in plan.FIGURES] == list(figures.STEPS)
    assert [step.name for step in plan.PROGRAMS] == list(programs.PROGRAMS)


# ---- rehearsal ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def rehearsed(made_once):
    """The report of a whole rehearsal, and its file."""
    (path,) = made_once("rehearsal", rehearse).glob("*.json")
    return json.loads(path.read_text()), path


def rehearse(folder):
    command = [sys.executable, "-m", "benchmarks.gpu", "--rehearse", "--installed", "--out", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=1500)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]


def test_the_rehearsal_runs_every_step_on_every_backend(rehearsed):
    content, _ = rehearsed
    assert content["status"] == "passed"
    assert [(s["step"], s["status"]) for s in content["steps"]] == [
        (step.name, "ok") for step in (*plan.FIGURES, *plan.PROGRAMS)
    ]
    for step in ("smoke", "pairwise_min", "class_moments", "patches"):
        assert {"cuda", "triton"} <= {row.get("backend") for row in content["rows"] if row["step"] == step}, step
    passed = {row["test"].partition("[")[0] for row in content["rows"] if row.get("test") and row["status"] == "ok"}
    assert len(passed) >= 12
    timed = [
        row
        for row in content["rows"]
        if row["step"] in ("ceilings", "class_moments", "patches") and row["op"] != "cycles"
    ]
    assert all(row["seconds"] > 0 for row in timed)


def test_the_tables_show_what_was_measured(rehearsed):
    content, path = rehearsed
    text = table.markdown(path)
    for row in content["rows"]:
        if row["step"] == "class_moments":
            assert f"| {row['seconds'] * 1e6:.1f} |" in text
    assert text.count("| pairwise_min") == 0
    assert "| scoring pass | ViT-B/16 |" in text
    assert f"at {content['commit']} ({path.name})" in text
    assert "Not measured, or failed" in text  # what needs CUDA itself


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="Triton is for Linux")
def test_the_ceilings_kernels_do_one_thing():
    """Eight loads of 16 bytes before the first is used, and conversions that no compiler takes out of the loop."""
    code = """
        import re, triton
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource
        from benchmarks.gpu import ceilings
        from discedit.kernels._launch import COMPILE

        def ptx(kernel, pointers, **constants):
            names = [name for name in kernel.arg_names if name not in constants]
            signature = {name: pointers.get(name, "i32") for name in names} | dict.fromkeys(constants, "constexpr")
            aligned = {(i,): [["tt.divisibility", 16]] for i in range(len(pointers))}
            source = ASTSource(kernel, signature, constants, aligned)
            return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=COMPILE).asm["ptx"]

        text = ptx(ceilings.read_kernel, {"x": "*i32", "out": "*i32"}, BLOCK=1024, BLOCKS=4)
        print(len(re.findall(r"ld.global.v4.b32", text.partition("xor")[0])))
        text = ptx(ceilings.convert_kernel, {"x": "*fp32", "out": "*fp64"}, BLOCK=256)
        print(len(re.findall(r"cvt.f64.f32", text.partition("bra")[2].partition("bra")[0])))
    """
    pytest.importorskip("triton")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.stdout.split() == ["8", "2"], done.stdout + done.stderr
