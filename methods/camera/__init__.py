"""CAMERA (arXiv 2508.02322): compression of MoE models by micro-experts and their energy."""
