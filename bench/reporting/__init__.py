"""Output for readers. Modules here read records only and never touch a model."""
