"""Training of retaining heads, and of the small model shipped with the package."""
