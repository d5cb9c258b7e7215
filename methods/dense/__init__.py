"""Methods for decoders without experts: single weights of linear layers, and whole layers."""
