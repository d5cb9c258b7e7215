"""Training-free pruning of visual tokens, on the engine of the visual token strategies."""
