"""Methods that compare the frames of a prompt: images of equal size, or time steps of a video."""
