"""Methods that compare the frames of a prompt: images of one size in a row, steps of a video."""
