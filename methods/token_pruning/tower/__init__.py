"""Methods that choose by what the vision tower computes, before its tokens reach the decoder."""
