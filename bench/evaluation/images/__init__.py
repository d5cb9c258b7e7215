"""Image classification: how often the class of highest probability is the right one."""
