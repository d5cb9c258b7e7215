"""Training-free selection: choosing the atoms of a layer that best rebuild its output."""
