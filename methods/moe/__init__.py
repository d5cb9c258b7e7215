"""What the MoE families share."""
