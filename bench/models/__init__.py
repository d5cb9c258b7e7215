"""Loading models, and locating the parts that methods change."""
