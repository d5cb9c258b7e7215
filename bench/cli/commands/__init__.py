"""Empty face of the package."""
