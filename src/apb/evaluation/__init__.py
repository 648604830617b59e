"""Measuring answers: generated tasks, and the official long-context collections."""
