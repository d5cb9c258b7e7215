"""Groups of weights that are kept or removed together, in convnets and transformers."""
