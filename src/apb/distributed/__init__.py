"""Processes and what they say to each other: starting or joining them, and the collectives."""
