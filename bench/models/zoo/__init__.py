"""Small trained models that ship with the package, each with the recipe that made it."""
