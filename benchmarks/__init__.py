"""Comparisons with peers. `python -m benchmarks` runs them all; they are never tests."""
