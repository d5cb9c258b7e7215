"""The config of a run: composition with Hydra, validation, and checks of untrusted configs."""
