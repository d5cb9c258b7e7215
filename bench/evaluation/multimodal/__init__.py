"""Questions about images, sent and scored by lmms-eval with a loaded model."""
