"""Loading of models, and the location of the parts that methods change."""
