"""Benchmarks: every figure comes with a baseline and a lower bound from the same run."""
