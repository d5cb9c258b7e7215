"""Training towards few groups: optimizers, schedules, budgets, the loop, checkpoints."""
