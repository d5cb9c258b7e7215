"""WGSEF (arXiv 2212.12921): training towards exactly k groups, and competing methods."""
