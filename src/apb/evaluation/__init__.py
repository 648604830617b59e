"""Evaluation of answers: generated tasks, and the official long-context benchmarks."""
