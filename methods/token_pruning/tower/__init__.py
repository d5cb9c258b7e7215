"""Methods that choose tokens by the vision tower's attention or features, before the decoder."""
