"""Training: the retaining heads of a compressor, and the small model that ships with the package."""
