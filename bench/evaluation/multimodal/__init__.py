"""Questions about images, asked and scored by lmms-eval with a loaded model."""
