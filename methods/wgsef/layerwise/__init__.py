"""Training-free selection: the atoms of a layer that best reconstruct its output."""
