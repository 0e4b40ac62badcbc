"""What the package is after an installation, with and without a C++ compiler."""

import json
import os
import re
import runpy
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from setuptools import Distribution

ROOT = Path(__file__).parent.parent
NEEDED = [
    "setup.py",
    "pyproject.toml",
    "CMakeLists.txt",
    "README.md",
    "LICENSE",
    "csrc",
    "discedit",
    "kernels",
    "MANIFEST.in",
]


def copy_tracked(target: Path) -> None:
    listed = subprocess.run(["git", "ls-files", *NEEDED], cwd=ROOT, capture_output=True, text=True, check=True)
    for name in listed.stdout.splitlines():
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        (target / name).write_bytes((ROOT / name).read_bytes())


def build(folder: Path, **environment: str) -> tuple[Path, str]:
    """A wheel of a copy of the tree (nothing of the working tree's own build), unpacked; and what pip said."""
    source = folder / "source"
    source.mkdir()
    copy_tracked(source)
    command = [sys.executable, "-m", "pip", "wheel", "-v", "--no-deps", "--no-build-isolation", "-w", str(folder), "."]
    run = subprocess.run(
        command, cwd=source, env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )
    wheels = list(folder.glob("*.whl"))
    if run.returncode or not wheels:
        return folder, run.stdout + run.stderr
    unpacked = folder / "unpacked"
    with zipfile.ZipFile(wheels[0]) as archive:
        archive.extractall(unpacked)
    return unpacked, run.stdout + run.stderr


# An editable install would lend its own modules to this one.
ALONE = "import sys; sys.meta_path[:] = [finder for finder in sys.meta_path if 'editable' not in repr(finder)]; "


def run_in(unpacked: Path, code: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(unpacked)}
    done = subprocess.run(
        [sys.executable, "-c", ALONE + code], cwd=unpacked, env=environment, capture_output=True, text=True, check=True
    )
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def built(made_once):
    """Without optimisation, in a quarter of the time: nothing here depends on it."""

    def make(folder):
        launcher = folder / "unoptimised"
        launcher.write_text('#!/bin/sh\nexec "$@" -O0\n')
        launcher.chmod(0o755)
        modes = {"DISCEDIT_BUILD": "require", "DISCEDIT_CUDA": "off"}  # tests/test_cuda_build.py builds `_cuda`
        said = build(folder, **modes, CMAKE_ARGS=f"-DCMAKE_CXX_COMPILER_LAUNCHER={launcher}")[1]
        assert (folder / "unpacked").is_dir(), said

    return made_once("built", make) / "unpacked"


@pytest.fixture(scope="module")
def without_compiler(made_once):
    def make(folder):
        said = build(folder, CXX="no-such-compiler", DISCEDIT_BUILD="auto")[1]
        (folder / "said.txt").write_text(said)

    folder = made_once("without_compiler", make)
    return folder / "unpacked", (folder / "said.txt").read_text()


@pytest.mark.slow
def test_the_wheel_holds_everything(built):
    names = {str(path.relative_to(built)) for path in built.rglob("*") if path.is_file()}
    assert {"discedit/py.typed", "discedit/_cpu.pyi", "discedit/kernels/__init__.py", "discedit/_build.json"} <= names
    assert {"discedit/reporting/report.html", "discedit/reporting/report.css"} <= names
    assert any(name.startswith("discedit/_cpu.") and name.endswith((".so", ".pyd")) for name in names)
    assert not any(name.startswith(("tests", "benchmarks", "kernels", "csrc")) for name in names)
    note = json.loads((built / "discedit" / "_build.json").read_text())
    assert note["cpu"]["built"]
    assert "discedit/_cuda.pyi" in names
    assert note["cuda"] == {
        "built": False,
        "reason": "not built: DISCEDIT_CUDA=off when discedit was installed",
        "compiler": note["cuda"]["compiler"],
    }


@pytest.mark.slow
def test_the_built_wheel_runs(built):
    code = "import discedit, discedit.kernels, discedit._cpu as c; print(discedit.__file__, c.__file__)"
    assert run_in(built, code).count(str(built)) == 2


@pytest.mark.slow
def test_the_binary_links_no_torch_and_is_portable(built):
    library = next((built / "discedit").glob("_cpu.*.so"))
    needed = subprocess.run(["readelf", "-d", str(library)], capture_output=True, text=True, check=False)
    if needed.returncode:
        pytest.skip("needs readelf (binutils)")
    libraries = [line for line in needed.stdout.splitlines() if "NEEDED" in line]
    assert libraries
    assert not any("torch" in line or "c10" in line or "gomp" in line for line in libraries)


@pytest.mark.slow
def test_installs_without_a_compiler_and_says_so(without_compiler):
    unpacked, said = without_compiler
    assert (unpacked / "discedit").is_dir(), said
    assert "no C++ compiler found when discedit was installed (looked for no-such-compiler)" in said
    assert not list((unpacked / "discedit").glob("_cpu.*so"))
    report = run_in(unpacked, "from discedit.cli.main import main; main(['doctor'])")
    assert "cpp        cannot run  discedit._cpu not built: no C++ compiler found when discedit was installed" in report
    assert "reference  runs" in report


@pytest.mark.slow
def test_works_without_a_compiler_and_warns_once(without_compiler):
    unpacked, _ = without_compiler
    code = "import torch, discedit; [discedit.ops.pool(torch.ones(1, 2, 2, 2)) for _ in range(3)]; print('worked')"
    said = run_in(unpacked, code)
    assert said.count("running on the slower torch reference") == 1
    assert "worked" in said


@pytest.mark.slow
def test_a_compiler_that_fails_is_no_dead_end(tmp_path):
    unpacked, said = build(tmp_path, CXX="false", DISCEDIT_BUILD="auto")
    assert (unpacked / "discedit").is_dir(), said
    note = json.loads((unpacked / "discedit" / "_build.json").read_text())["cpu"]
    assert not note["built"]
    assert note["reason"].startswith("not built: building with false failed when discedit was installed")


@pytest.fixture
def build_ext(monkeypatch):
    """The command that setup.py gives to setuptools."""
    given = {}
    monkeypatch.setattr("setuptools.setup", lambda **options: given.update(options))
    runpy.run_path(str(ROOT / "setup.py"))
    command = given["cmdclass"]["build_ext"](Distribution())
    monkeypatch.setitem(command.build_cuda.__globals__, "has_gpu", lambda: True)
    return command


def test_a_cuda_compiler_that_fails_is_no_dead_end(build_ext, monkeypatch):
    monkeypatch.setenv("CUDACXX", "false")

    def fail(target, *definitions):
        assert target == "_cuda"
        assert "-DDISCEDIT_CUDA=on" in definitions
        raise subprocess.CalledProcessError(1, "cmake")

    monkeypatch.setattr(build_ext, "build_with_cmake", fail)
    note = build_ext.build_cuda("auto", "auto", no_cpu=False)
    assert not note["built"]
    assert note["compiler"] == "false"
    assert re.match(r"not built: building with \S*false failed when discedit was installed", note["reason"])
    with pytest.raises(SystemExit, match="DISCEDIT_BUILD=require, but _cuda was not built: building with"):
        build_ext.build_cuda("require", "auto", no_cpu=False)


@pytest.mark.parametrize(
    ("modes", "compiler", "reason"),
    [
        (("auto", "off"), "false", "not built: DISCEDIT_CUDA=off when discedit was installed"),
        (("off", "auto"), "false", "not built: DISCEDIT_BUILD=off when discedit was installed"),
        (("require", "auto"), "no-such-nvcc", "not built: no CUDA compiler (nvcc) found when discedit was installed"),
    ],
)
def test_why_cuda_was_not_built(build_ext, monkeypatch, modes, compiler, reason):
    monkeypatch.setenv("CUDACXX", compiler)
    assert build_ext.build_cuda(*modes, no_cpu=False)["reason"] == reason
    no_gpu = "not built: no NVIDIA GPU found when discedit was installed (DISCEDIT_CUDA=require builds it)"
    monkeypatch.setitem(build_ext.build_cuda.__globals__, "has_gpu", lambda: False)
    assert build_ext.build_cuda("require", "auto", no_cpu=False)["reason"] == no_gpu  # before anything is compiled
    monkeypatch.setenv("CUDACXX", "no-such-nvcc")
    with pytest.raises(SystemExit, match=r"DISCEDIT_CUDA=require, but _cuda was not built: no CUDA compiler \(nvcc\)"):
        build_ext.build_cuda("require", "require", no_cpu=False)


@pytest.mark.slow
def test_the_source_distribution_builds(tmp_path):
    command = [sys.executable, "setup.py", "-q", "sdist", "--dist-dir", str(tmp_path)]
    source = tmp_path / "source"
    source.mkdir()
    copy_tracked(source)
    subprocess.run(command, cwd=source, capture_output=True, check=True)
    with tarfile.open(next(tmp_path.glob("*.tar.gz"))) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {
        "CMakeLists.txt",
        "csrc/cpu/pool.cpp",
        "csrc/cuda/pool.cu",
        "csrc/common/bounds.hpp",
        "kernels/__init__.py",
        "LICENSE",
    } <= names


@pytest.mark.slow
def test_a_required_build_fails_without_a_compiler(tmp_path):
    folder, said = build(tmp_path, CXX="no-such-compiler", DISCEDIT_BUILD="require")
    assert not list(folder.glob("*.whl"))
    assert "DISCEDIT_BUILD=require, but _cpu was not built: no C++ compiler found" in said
