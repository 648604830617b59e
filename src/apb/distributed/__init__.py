"""Processes and their communication: starting or joining ranks, and collectives."""
