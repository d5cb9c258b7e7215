"""Empty face of the embedded data."""
