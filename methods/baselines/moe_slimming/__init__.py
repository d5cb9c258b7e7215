"""MoE-Slimming (arXiv 2606.18304): layers, experts and channels by coverage of attribution."""
