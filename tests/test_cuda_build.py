"""What nvcc makes of the kernels: registers, spills and local memory against what the kernels' comments claim.

Above each kernel stands `// occupancy: B blocks of T threads per SM`, which its registers and shared memory must allow
in every instantiation, and, where it may use any, `// local memory: N bytes per thread`.
"""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch.utils.dlpack import to_dlpack

ROOT = Path(__file__).parent.parent
SOURCES = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
ARCHITECTURES = ("sm_80", "sm_90", "sm_100")
# The same for all of them, but for shared memory: of sm_80, the least, and 1 KiB of each block's is the system's.
REGISTERS, REGISTER_UNIT, THREADS, BLOCKS, SHARED, SYSTEM = 65536, 256, 2048, 32, 164 * 1024, 1024

CLAIM = re.compile(
    r"// occupancy: (\d+) blocks? of (\d+) threads per SM\n"
    r"(?://(?: local memory: (\d+) bytes per thread)?.*\n)*"
    r"(?:template <[^>]*>\n)?__global__ void __launch_bounds__\((.*?)\)\s+(\w+)\(",
)
REPORT = re.compile(
    r"Compiling entry function '(\w+)' for '(\w+)'.*?"
    r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads.*?"
    r"Used (\d+) registers([^\n]*)",
    re.DOTALL,
)


@dataclass(frozen=True)
class Claim:
    blocks: int
    threads: int
    local: int


def claims(source: Path) -> dict[str, Claim]:
    text = source.read_text()
    found = {name: Claim(int(b), int(t), int(local or 0)) for b, t, local, _, name in CLAIM.findall(text)}
    assert len(found) == text.count("__global__"), f"{source.name}: a kernel without a claim, or one that is not read"
    return found


@pytest.fixture(scope="module")
def reports(made_once):
    """What ptxas says of each source."""
    if shutil.which("nvcc") is None:
        pytest.skip("needs nvcc")
    folder = made_once("nvcc", compile_all)
    return {source: (folder / f"{source.stem}.txt").read_text() for source in SOURCES}


def compile_all(folder):
    """All architectures in one run of nvcc, two runs at a time."""
    options = ["-std=c++17", "--expt-relaxed-constexpr", "-Xptxas", "-v", "-c", "-Werror", "all-warnings"]
    for architecture in ARCHITECTURES:
        options += ["-gencode", f"arch=compute_{architecture[3:]},code={architecture}"]
    waiting, running = list(SOURCES), []
    while waiting or running:
        while waiting and len(running) < 2:
            source = waiting.pop(0)
            command = ["nvcc", *options, str(source), "-o", str(folder / f"{source.stem}.o")]
            running.append(
                (source, subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True))
            )
        source, process = running.pop(0)
        said = process.communicate()[0]
        assert process.returncode == 0, f"{source.name}: {said}"
        (folder / f"{source.stem}.txt").write_text(said)


@pytest.mark.slow
@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_kernels_keep_what_their_comments_claim(reports, source):
    claimed, seen = claims(source), set()
    for mangled, architecture, stack, _, _, registers, rest in REPORT.findall(reports[source]):
        # In a mangled name a length stands before each name, so that none is taken for the end of another.
        name = next(name for name in claimed if f"{len(name)}{name}" in mangled)
        claim, where = claimed[name], f"{name} for {architecture} ({mangled})"
        seen.add((name, architecture))
        assert int(stack) <= claim.local, f"{where}: {stack} bytes of local memory, {claim.local} claimed"
        of_warp = -(-int(registers) * 32 // REGISTER_UNIT) * REGISTER_UNIT
        warps = claim.threads // 32
        shared = re.search(r"(\d+) bytes smem", rest)
        fits = min(
            REGISTERS // of_warp // warps,
            THREADS // claim.threads,
            BLOCKS,
            SHARED // (int(shared[1]) + SYSTEM) if shared else BLOCKS,
        )
        assert fits >= claim.blocks, f"{where}: {registers} registers allow {fits} blocks, {claim.blocks} claimed"
    assert seen == {(name, architecture) for name in claimed for architecture in ARCHITECTURES}


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_claims_are_those_of_the_launch_bounds(source):
    """The number of threads claimed is the one that the kernel is launched with."""
    text = source.read_text()
    kernels = claims(source)
    if kernels:
        threads = re.search(r"constexpr int (?:tile = (\d+);.*\n.*lanes = (\d+);.*\n.*)?threads = ?(\d+)?", text)
        assert threads is not None
        number = int(threads[3]) if threads[3] else int(threads[1]) * int(threads[2])
        assert {claim.threads for claim in kernels.values()} == {number}


@pytest.mark.slow
def test_rows_are_read_16_bytes_at_a_time(tmp_path):
    """The chunk that a thread loads must stay one instruction."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("needs nvcc")
    target = tmp_path / "pool.ptx"
    command = [
        nvcc,
        "-std=c++17",
        "--expt-relaxed-constexpr",
        "-arch=compute_90",
        "-ptx",
        str(ROOT / "csrc/cuda/pool.cu"),
    ]
    subprocess.run([*command, "-o", str(target)], check=True)
    kernels = re.findall(r"\.entry (\w*pool_(?:rows|columns)\w*)\((.*?)\n}", target.read_text(), re.DOTALL)
    assert len(kernels) == 2 * 4 * 3
    for name, body in kernels:
        assert re.search(r"ld\.global(\.nc)?\.v4\.(u32|b32)", body), name
        assert ".f64" in body
        assert not re.search(r"\b(red|atom)\.", body), name


@pytest.fixture(scope="module")
def module(made_once):
    """discedit._cuda as setup.py has CMake build it, for one architecture."""
    if shutil.which("nvcc") is None or shutil.which("cmake") is None:
        pytest.skip("needs nvcc and cmake")
    path = next((made_once("cmake", build_module) / "installed").glob("_cuda.*"))
    spec = importlib.util.spec_from_file_location("_cuda", path)
    assert spec is not None
    assert spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)  # also where there is neither GPU nor driver
    return loaded


def build_module(folder):
    import pybind11

    configure = [
        f"-DPython_EXECUTABLE={sys.executable}",
        f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
        f"-DCMAKE_INSTALL_PREFIX={folder / 'installed'}",
        "-DDISCEDIT_CUDA=on",
        "-DDISCEDIT_WERROR=ON",
        "-DCMAKE_CUDA_ARCHITECTURES=90",
    ]
    steps = [
        [str(ROOT), *configure],
        ["--build", ".", "--target", "_cuda", "--parallel", "2"],
        ["--install", ".", "--component", "cuda"],
    ]
    for step in steps:
        done = subprocess.run(["cmake", *step], cwd=folder, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
def test_the_module_needs_no_cuda_libraries(module):
    needed = subprocess.run(["readelf", "-d", module.__file__], capture_output=True, text=True, check=False)
    if needed.returncode:
        pytest.skip("needs readelf (binutils)")
    libraries = [line for line in needed.stdout.splitlines() if "NEEDED" in line]
    assert libraries
    assert not any("cuda" in line or "torch" in line for line in libraries)


@pytest.mark.slow
def test_the_module_refuses_cpu_memory(module):
    out = torch.zeros(1, 2, 3, dtype=torch.float64)
    with pytest.raises(ValueError, match="pool: x must be in CUDA memory, got DLPack device type 1"):
        module.pool(to_dlpack(torch.zeros(2, 3)), 1, ["mean"], to_dlpack(out), None, 0)
    with pytest.raises(ValueError, match="pool: x must be in CUDA memory, got a NumPy array"):
        module.pool(out.numpy(), 1, ["mean"], to_dlpack(out), None, 0)


@pytest.mark.slow
def test_an_error_of_cuda_names_the_op(module):
    """Without a device the first call fails; with one, there is nothing to see here."""
    from test_cuda_kernels import on_device

    if torch.cuda.is_available():
        pytest.skip("needs a machine without a CUDA device")
    with pytest.raises(RuntimeError, match=r"^pool: CUDA: .+\.$"):
        module.pool(on_device(0, 2, 3), 1, ["mean"], on_device(0, 1, 2, 3), None, 0)
