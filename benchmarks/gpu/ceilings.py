"""What the device can do at most: two kernels that do one thing, in Triton, so that they need no other compiler."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from discedit.kernels._launch import COMPILE

READ_BLOCK, READ_BLOCKS = 1024, 4  # a thread of 128 has eight loads of 16 bytes in flight
CONVERT_BLOCK = 256


@triton.jit
def read_kernel(x, out, BLOCK: tl.constexpr, BLOCKS: tl.constexpr):
    """Bits of 32-bit integers that occur an odd number of times: a program reads BLOCKS x BLOCK, all asked for at
    once."""
    program = tl.program_id(0)
    place = program.to(tl.int64) * (BLOCK * BLOCKS) + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.int32)
    for i in tl.static_range(BLOCKS):
        total ^= tl.load(x + place + i * BLOCK)
    tl.store(out + program, tl.xor_sum(total, 0))


@triton.jit
def convert_kernel(x, out, turns, BLOCK: tl.constexpr):
    """out = sum over turns i of (x + i), each term converted from float32 to float64."""
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + place)
    total = tl.zeros([BLOCK], tl.float64)
    for _ in range(turns):
        total += value.to(tl.float64)
        value += 1.0
    tl.store(out + place, total)


def read(x: Tensor, out: Tensor) -> None:
    """Reads `x` (int32, a multiple of 4,096 elements) once; `out` (int32) gets their bits, each 4,096 xored."""
    read_kernel[(x.numel() // (READ_BLOCK * READ_BLOCKS),)](x, out, BLOCK=READ_BLOCK, BLOCKS=READ_BLOCKS, **COMPILE)


def convert(x: Tensor, out: Tensor, turns: int) -> None:
    """`turns` conversions for each element of `x` (float32, a multiple of 256 elements) into `out` (float64)."""
    convert_kernel[(x.numel() // CONVERT_BLOCK,)](x, out, turns, BLOCK=CONVERT_BLOCK, **COMPILE)
