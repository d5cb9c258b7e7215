"""Questions about images as lmms-eval asks and scores them, around our loaded model."""
