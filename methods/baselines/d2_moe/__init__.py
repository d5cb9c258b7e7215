"""D2-MoE (arXiv 2502.17298): one base expert a layer, and a low-rank difference for each expert."""
