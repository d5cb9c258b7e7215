"""Image classifiers: the networks of the WGSEF experiments, and small versions of them."""
