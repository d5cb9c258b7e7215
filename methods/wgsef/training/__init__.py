"""Training towards few groups: optimizers, schedules, budgets, the training loop, checkpoints."""
