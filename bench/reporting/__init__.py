"""Reports for readers. Modules here read only records and never touch a model."""
