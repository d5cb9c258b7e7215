"""Structure of a network: its decoder layers and MoE blocks."""
