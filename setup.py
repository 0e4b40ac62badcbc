"""Drives CMake. Never imports torch: the extension takes DLPack, so no torch version is compiled against.

Environment:
    DISCEDIT_BUILD   auto (default): build where that works, else install with the reference backend and say why;
                     require: fail where it does not (of `_cuda`: where there is a CUDA compiler and it fails);
                     off: do not build.
    DISCEDIT_CUDA    auto (default): build `_cuda` too where there is an NVIDIA GPU and a CUDA compiler (CUDACXX, or
                     nvcc), which takes minutes; require: wherever there is a compiler, and fail where it is not
                     built, for whatever reason; off: do not build it.
    CMAKE_ARGS       passed on to CMake.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
COMPILERS = ("c++", "g++", "clang++", "cl")


def find_compiler() -> str | None:
    """The C++ compiler that CMake would use, or None."""
    chosen = os.environ.get("CXX")
    if chosen:
        return shutil.which(shlex.split(chosen)[0])
    return next((path for path in map(shutil.which, COMPILERS) if path), None)


def find_cuda_compiler() -> str | None:
    """The CUDA compiler that CMake would use, or None."""
    chosen = os.environ.get("CUDACXX")
    if chosen:
        return shutil.which(chosen)
    folders = [os.environ.get(name) for name in ("CUDA_HOME", "CUDA_PATH")] + ["/usr/local/cuda"]
    places = [os.environ.get("PATH", ""), *(str(Path(folder, "bin")) for folder in folders if folder)]
    return shutil.which("nvcc", path=os.pathsep.join(places))


def has_gpu() -> bool:
    """Whether NVIDIA's driver lists a device."""
    command = shutil.which("nvidia-smi")
    if command is None:
        return False
    try:
        listed = subprocess.run([command, "--list-gpus"], capture_output=True, text=True, check=False, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return listed.returncode == 0 and "GPU" in listed.stdout


def commit() -> str | None:
    """Of the source, where it is a checkout: figures measured with a wheel say what they were measured on."""
    if not (ROOT / ".git").exists() or shutil.which("git") is None:
        return None
    described = subprocess.run(
        ["git", "-C", str(ROOT), "describe", "--always", "--dirty"], capture_output=True, text=True, check=False
    )
    return described.stdout.strip() or None


class CMakeBuild(build_ext):
    """Configures, builds and installs `_cpu` and `_cuda`; notes in `_build.json` what was built, or why not."""

    def run(self) -> None:
        mode = os.environ.get("DISCEDIT_BUILD", "auto")
        if mode not in ("auto", "require", "off"):
            raise SystemExit(f"DISCEDIT_BUILD must be auto, require or off, got {mode!r}.")
        cuda_mode = os.environ.get("DISCEDIT_CUDA", "auto")
        if cuda_mode not in ("auto", "require", "off"):
            raise SystemExit(f"DISCEDIT_CUDA must be auto, require or off, got {cuda_mode!r}.")
        compiler = find_compiler()
        if mode == "off":
            reason = "not built: DISCEDIT_BUILD=off when discedit was installed"
        elif compiler is None:
            looked = os.environ.get("CXX") or ", ".join(COMPILERS)
            reason = f"not built: no C++ compiler found when discedit was installed (looked for {looked})"
            if mode == "require":
                raise SystemExit(f"discedit: DISCEDIT_BUILD=require, but _cpu was {reason}.")
        else:
            reason = ""
        if reason:
            print(f"discedit: _cpu {reason}. The torch reference backend will be used.", file=sys.stderr)
        else:
            try:
                self.build_with_cmake("_cpu", "-DDISCEDIT_CUDA=off")
            except (subprocess.CalledProcessError, OSError) as error:
                # A compiler alone is not enough: the Python headers may be missing, say.
                reason = (
                    f"not built: building with {Path(compiler or '').name} failed when discedit was installed ({error})"
                )
                if mode == "require":
                    raise SystemExit(f"discedit: DISCEDIT_BUILD=require, but _cpu was {reason}.") from error
                print(f"discedit: _cpu {reason}. The torch reference backend will be used.", file=sys.stderr)
        target = Path(self.get_ext_fullpath("discedit._cpu")).parent
        target.mkdir(parents=True, exist_ok=True)
        note = {"cpu": {"built": not reason, "reason": reason, "compiler": Path(compiler).name if compiler else None}}
        note["cuda"] = self.build_cuda(mode, cuda_mode, bool(reason))
        note["commit"] = commit()
        (target / "_build.json").write_text(json.dumps(note, indent=1) + "\n")

    def build_cuda(self, mode: str, cuda_mode: str, no_cpu: bool) -> dict[str, object]:
        """Builds `_cuda` by itself: whatever goes wrong there leaves `_cpu` as it is."""
        compiler, reason = find_cuda_compiler(), ""
        if mode == "off" or cuda_mode == "off":
            variable = "DISCEDIT_BUILD" if mode == "off" else "DISCEDIT_CUDA"
            reason = f"not built: {variable}=off when discedit was installed"
        elif no_cpu:
            reason = "not built: _cpu could not be built when discedit was installed"
        elif cuda_mode == "auto" and not has_gpu():
            reason = "not built: no NVIDIA GPU found when discedit was installed (DISCEDIT_CUDA=require builds it)"
        elif compiler is None:
            reason = "not built: no CUDA compiler (nvcc) found when discedit was installed"
        else:
            try:
                self.build_with_cmake("_cuda", "-DDISCEDIT_CUDA=on", f"-DCMAKE_CUDA_COMPILER={compiler}")
            except (subprocess.CalledProcessError, OSError) as error:
                reason = f"not built: building with {compiler} failed when discedit was installed ({error})"
                if mode == "require":
                    raise SystemExit(f"discedit: DISCEDIT_BUILD=require, but _cuda was {reason}.") from error
        if reason and cuda_mode == "require":
            raise SystemExit(f"discedit: DISCEDIT_CUDA=require, but _cuda was {reason}.")
        if reason:
            print(f"discedit: _cuda {reason}.", file=sys.stderr)
        return {"built": not reason, "reason": reason, "compiler": Path(compiler).name if compiler else None}

    def build_with_cmake(self, target: str, *definitions: str) -> None:
        import pybind11

        output = Path(self.get_ext_fullpath("discedit._cpu")).resolve().parent
        # CMake remembers its build tool's path; an isolated pip build has a new one each time, so nothing is reused.
        build = Path(self.build_temp).resolve() / f"cmake{target}"
        shutil.rmtree(build, ignore_errors=True)
        build.mkdir(parents=True)
        configure = [
            "cmake",
            str(ROOT),
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DCMAKE_INSTALL_PREFIX={output}",
            "-DCMAKE_BUILD_TYPE=Release",
            *definitions,
            *shlex.split(os.environ.get("CMAKE_ARGS", "")),
        ]
        if shutil.which("ninja"):
            configure.append("-GNinja")
        subprocess.run(configure, cwd=build, check=True)
        steps = (["--build", ".", "--target", target, "--parallel"], ["--install", ".", "--component", target[1:]])
        for step in steps:
            subprocess.run(["cmake", *step, "--config", "Release"], cwd=build, check=True)

    def get_outputs(self) -> list[str]:
        modules = [Path(self.get_ext_fullpath(name)) for name in ("discedit._cpu", "discedit._cuda")]
        return [str(path) for path in (*modules, modules[0].parent / "_build.json") if path.exists()]


# Metadata lives in pyproject.toml; what depends on the folder layout and the build lives here.
setup(
    packages=[
        *(f"discedit.{path.parent.name}" for path in sorted(ROOT.glob("discedit/*/__init__.py"))),
        "discedit",
        "discedit.kernels",
    ],
    package_dir={"discedit": "discedit", "discedit.kernels": "kernels"},
    package_data={"discedit": ["py.typed", "*.pyi"], "discedit.reporting": ["*.html", "*.css"]},
    ext_modules=[Extension("discedit._cpu", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
)
