"""Which jobs a sweep has and where they run: sweepers, and launchers around real engines."""
