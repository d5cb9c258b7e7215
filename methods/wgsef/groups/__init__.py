"""Groups: which weights live and die together, in convolutional networks and in transformers."""
