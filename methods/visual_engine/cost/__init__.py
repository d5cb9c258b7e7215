"""FLOPs of a visual plan: in closed form for budgets, and counted exactly for a prompt."""
