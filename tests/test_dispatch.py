"""The same bits from every instruction set, so that a result does not depend on the machine."""

import hashlib
import subprocess
import sys
import textwrap

import pytest
from test_install import ALONE, build

import discedit._cpu

DIGEST = textwrap.dedent(
    """
    import hashlib, numpy as np
    rng = np.random.default_rng(0)
    digest = hashlib.sha256()
    base = (rng.normal(size=(40, 70, 9, 13)) * 3 + 1).astype(np.float32)
    maps = [base, base.astype(np.float64), base.astype(np.float16), base[:, ::2, 1:, ::3], base.transpose(0, 2, 3, 1)]
    labels = np.arange(40) % 3
    for x in maps:
        for axis in (1, 3):
            channels = x.shape[axis]
            state = [np.zeros(3, np.int64)] + [np.zeros((3, channels)) for _ in range(4)]
            for part in (slice(0, 25), slice(25, 40)):
                _cpu.class_moments(x[part], axis, labels[part].copy(), *state)
            out = np.empty((channels, 3))
            _cpu.one_vs_rest(*state, "minimax", "quadratic", out)
            for array in (*state, out):
                digest.update(array.tobytes())
    print(digest.hexdigest(), _cpu.instruction_set())
    """
)


@pytest.mark.parametrize(("flags", "level"), [("", "baseline"), ("-mavx2 -mfma", "baseline")])
def test_every_level_gives_the_same_bits(tmp_path, flags, level):
    unpacked, said = build(
        tmp_path, DISCEDIT_BUILD="require", CMAKE_ARGS=f"-DCMAKE_CXX_FLAGS='-DDISCEDIT_NO_CLONES {flags}'"
    )
    assert (unpacked / "discedit").is_dir(), said
    if flags and discedit._cpu.instruction_set() == "baseline":
        pytest.skip("needs a processor with AVX2")
    code = f"{ALONE}sys.path.insert(0, {str(unpacked)!r}); from discedit import _cpu\n{DIGEST}"
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    mine = subprocess.run(
        [sys.executable, "-c", f"from discedit import _cpu\n{DIGEST}"], capture_output=True, text=True, check=True
    ).stdout.split()
    assert other[1] == level
    assert mine[1] == discedit._cpu.instruction_set()
    assert len(mine[0]) == len(hashlib.sha256().hexdigest())
    assert other[0] == mine[0]
