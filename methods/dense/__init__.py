"""Methods for dense decoders: pruning of single weights, neurons, heads and whole layers."""
