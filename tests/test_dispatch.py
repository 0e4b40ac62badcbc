"""The same bits from every instruction set, so that a result does not depend on the machine."""

import functools
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import discedit._cpu

CSRC = Path(__file__).parent.parent / "csrc" / "cpu"

DIGEST = textwrap.dedent(
    """
    import hashlib
    import numpy as np
    from discedit import _cpu

    rng = np.random.default_rng(0)
    digest = hashlib.sha256()
    statistics = ["mean", "sum", "l2", "rms", "absmax", "max", "positive_fraction"]
    base = (rng.normal(size=(40, 70, 9, 13)) * 3 + 1).astype(np.float32)
    maps = [base, base.astype(np.float64), base.astype(np.float16), base[:, ::2, 1:, ::3], base.transpose(0, 2, 3, 1)]
    labels = np.arange(40) % 3
    for x in maps:
        for axis in (1, 3):
            channels = x.shape[axis]
            pooled = np.empty((7, 40, channels))
            _cpu.pool(x, axis, statistics, pooled)
            scalar = (np.zeros(3, np.int64), *(np.zeros((3, channels)) for _ in range(4)))
            vector = (np.zeros(3, np.int64), np.zeros((7, 3, channels)), np.zeros((28, 3, channels)))
            exponential = (np.zeros(3, np.int64), *(np.zeros((3, channels)) for _ in range(4)))
            for part in (slice(0, 25), slice(25, 40)):
                own = labels[part].copy()
                _cpu.class_moments(x[part], axis, ["mean"], 0.0, own, scalar)
                _cpu.class_moments(x[part], axis, ["rms"], 0.3, own, exponential)
                _cpu.class_moments(x[part], axis, statistics, 0.0, own, vector)
            for array in (pooled, *scalar, *vector, *exponential):
                digest.update(array.tobytes())
            merged = tuple(array.copy() for array in scalar)
            _cpu.merge_moments(merged, exponential)
            for bound in ("fisher", "minimax"):
                for state, witness in ((merged, "linear"), (scalar, "quadratic"), (vector, "vector")):
                    out = np.empty((channels, 3))
                    _cpu.one_vs_rest(state, bound, witness, out)
                    values, pairs = np.empty(channels), np.empty((channels, 2), np.int64)
                    _cpu.pairwise_min(state, bound, witness, values, pairs)
                    for array in (out, values, pairs):
                        digest.update(array.tobytes())
            family = [("minimax_published", 0, 0, 0, 0, 1), ("robust", 1.5, 0.1, 0, 0, 1), ("hellinger", 0, 0, 0, 0, 1)]
            of_one_number = [("witness", 0, 0, 0, 0, 1), ("witness_published", 0, 0, 0, 0, 1)]
            of_one_number.append(("certified", 0, 0, 3.0, -50.0, 50.0))
            for rule in family + of_one_number:
                for state, witness in ((merged, "linear"), (scalar, "quadratic"), (vector, "vector")):
                    if rule in of_one_number and witness != "linear":
                        continue
                    pairs = np.empty((channels, 2), np.int64)
                    rest, all_pairs = np.empty((channels, 3)), np.empty((channels, 3, 3))
                    least, mean = np.empty(channels), np.empty(channels)
                    _cpu.one_vs_one(state, rule, witness, "with_rest", rest, None)
                    _cpu.one_vs_one(state, rule, witness, "all_pairs", all_pairs, None)
                    _cpu.one_vs_one(state, rule, witness, "mean", mean, None)
                    _cpu.one_vs_one(state, rule, witness, "least", least, pairs)
                    for array in (rest, all_pairs, mean, least, pairs):
                        digest.update(array.tobytes())
    for x in (*maps, base[:, :3], base[:, :1].astype(np.float16)):
        for kernel, stride, padding in (((3, 3), (1, 1), (1, 1, 1, 1)), ((2, 4), (2, 1), (0, 1, 2, 0))):
            taps = kernel[0] * kernel[1]
            mean, scatter = np.empty((x.shape[1], taps)), np.empty((x.shape[1], taps, taps))
            for places in (None, np.array([5, 0, 5])):
                _cpu.patch_moments(x, kernel, stride, padding, (1, 1), places, mean, scatter)
                for array in (mean, scatter):
                    digest.update(array.tobytes())
    for d in (1, 2, 3, 4, 5, 8, 12, 20):
        root = rng.normal(size=(2, 33, d, d))
        cov = root @ root.transpose(0, 1, 3, 2)
        mean = rng.normal(size=(2, 33, d))
        for bound in ("fisher", "minimax"):
            out = np.empty(33)
            _cpu.bound(bound, mean[0], cov[0], mean[1], cov[1], out)
            digest.update(out.tobytes())
        for rule in (("robust", 0, 0.2, 0, 0, 1), ("hellinger", 0, 0, 0, 0, 1), ("minimax_published", 0, 0, 0, 0, 1)):
            _cpu.member(rule, mean[0], cov[0], mean[1], cov[1], np.abs(mean[0][:, 0]).copy(), out)
            digest.update(out.tobytes())
        second = mean**2 + 1
        for published in (False, True):
            one = [array[:, 0].copy() for array in (mean[0], second[0], mean[1], second[1])]
            _cpu.witness(published, *one, out)
            digest.update(out.tobytes())
    print(digest.hexdigest(), _cpu.instruction_set())
    """
)


@functools.cache
def run(level):
    environment = {**os.environ, "DISCEDIT_INSTRUCTION_SET": level}
    return subprocess.run([sys.executable, "-c", DIGEST], capture_output=True, text=True, env=environment)


@pytest.mark.skipif(platform.machine() != "x86_64", reason="elsewhere there is one instruction set")
@pytest.mark.parametrize("level", ["baseline", "avx2", "avx512"])
def test_every_level_gives_the_same_bits(level):
    best = run("")
    assert best.stdout.split()[1] == discedit._cpu.instruction_set()
    other = run(level)
    if "this processor does not have it" in other.stderr:
        pytest.skip(f"needs a processor with {level}")
    digest, used = other.stdout.split()
    assert used == level
    assert len(digest) == 64
    assert digest == best.stdout.split()[0]


def test_an_unknown_level_is_refused():
    assert "DISCEDIT_INSTRUCTION_SET must be one of baseline" in run("avx1024").stderr


@pytest.mark.slow
@pytest.mark.skipif(platform.system() != "Linux", reason="cross-compiles from Linux")
def test_compiles_for_aarch64(tmp_path):
    """NEON cannot run here, but every source must compile for it, without warnings."""
    compiler = shutil.which("aarch64-linux-gnu-g++")
    if compiler:
        command = [compiler, "-Wno-psabi"]
    elif importlib.util.find_spec("ziglang"):
        command = [sys.executable, "-m", "ziglang", "c++", "-target", "aarch64-linux-gnu"]
    else:
        pytest.fail("needs aarch64-linux-gnu-g++ or the ziglang package, which the extra 'dev' brings")
    sources = sorted(CSRC.glob("*.cpp"))
    assert len(sources) > 8
    running = []
    for source in sources:
        target = tmp_path / f"{source.stem}.o"
        flags = ["-std=c++17", "-O1", "-ffp-contract=off", "-Wall", "-Wextra", "-Wshadow", "-Werror", "-c"]
        process = subprocess.Popen(
            [*command, *flags, str(source), "-o", str(target)], stderr=subprocess.PIPE, text=True
        )
        running.append((source, target, process))
    said_by = [process.communicate()[1] for *_, process in running]  # of all, before one fails
    for (source, target, process), said in zip(running, said_by, strict=True):
        assert process.returncode == 0, f"{source.name}: {said}"
        header = target.read_bytes()[:20]
        assert header[:4] == b"\x7fELF"
        assert header[18] == 183, f"{source.name} was not compiled for aarch64"
