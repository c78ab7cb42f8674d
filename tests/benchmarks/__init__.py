"""Benchmarks, run by hand: ``python -m tests.benchmarks``. They are ratios; no test depends on a time."""
