"""Code shared by the MoE families."""
