"""Triton kernels of discedit, one module per op, named as in `discedit.ops`. Importing one takes Triton."""
