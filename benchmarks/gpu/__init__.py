"""The gate for a machine with a GPU: installs, checks, measures, tests, and keeps each figure as soon as it is there.

A machine may be at hand for minutes only, and once: nothing that fails or hangs here takes anything else along.
"""
