"""The CUDA kernels, compiled by a C++ compiler against `cuda_runtime.h` of this folder: they run without a GPU."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).parent.parent.parent
NAME = "_cuda_on_host"


def compiler() -> str | None:
    return shutil.which("g++")


def load(folder: Path) -> ModuleType:
    """The module that `compile_in` built in `folder`."""
    spec = importlib.util.spec_from_file_location(NAME, library_in(folder))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[NAME] = module
    spec.loader.exec_module(module)
    return module


def library_in(folder: Path) -> Path:
    return folder / f"{NAME}{sysconfig.get_config_var('EXT_SUFFIX')}"


def compile_in(folder: Path) -> Path:
    """The module's file, built in `folder`, two compilers at a time."""
    import pybind11

    sources = [*sorted((ROOT / "csrc" / "cuda").glob("*.cu")), ROOT / "csrc" / "bindings" / "cuda.cpp"]
    include = [Path(__file__).parent, pybind11.get_include(), sysconfig.get_path("include")]
    options = ["-std=c++17", "-O1", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Werror"]
    options += ["-Wno-unknown-pragmas", "-Wno-unused-variable"]
    options += ["-DDISCEDIT_CUDA_ON_HOST", f"-DDISCEDIT_MODULE={NAME}", *(f"-I{path}" for path in include)]
    waiting, running, objects = list(sources), [], []
    while waiting or running:
        while waiting and len(running) < 2:
            source = waiting.pop(0)
            target = folder / f"{source.name}.o"
            command = [str(compiler()), *options, "-x", "c++", "-c", str(source), "-o", str(target)]
            running.append((source, subprocess.Popen(command, stderr=subprocess.PIPE, text=True)))
            objects.append(target)
        source, process = running.pop(0)
        said = process.communicate()[1]
        assert process.returncode == 0, f"{source.name}: {said}"
    library = library_in(folder)
    subprocess.run([str(compiler()), "-shared", *map(str, objects), "-o", str(library)], check=True)
    return library
