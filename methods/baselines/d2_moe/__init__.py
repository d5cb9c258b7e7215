"""D2-MoE (arXiv 2502.17298): one base expert per layer plus a low-rank difference per expert."""
