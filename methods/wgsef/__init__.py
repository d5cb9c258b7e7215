"""WGSEF (arXiv 2212.12921): networks trained towards exactly k groups, and the rival methods."""
