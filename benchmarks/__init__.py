"""Benchmarks: every one checks its answer, measures its rivals and its ceiling in the same process, prints ratios."""
