"""Groups of weights that live and die together, in convolutional networks and transformers."""
