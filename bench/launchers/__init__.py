"""Where the jobs of a sweep run: Hydra launchers around joblib, submitit and Ray; and which jobs."""
