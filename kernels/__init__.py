"""Triton kernels of discedit, one module per op, named as in `discedit.ops`. This version has none yet."""
