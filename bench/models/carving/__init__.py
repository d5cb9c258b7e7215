"""A dense decoder carved into one with experts, without training."""
