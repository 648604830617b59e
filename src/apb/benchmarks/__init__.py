"""Figures: every one with its baseline from the same run, and the floor beside it."""
