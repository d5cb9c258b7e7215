"""Training-free pruning of visual tokens, built on the visual engine."""
