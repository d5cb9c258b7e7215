"""Image classification, scored by top-1 accuracy."""
