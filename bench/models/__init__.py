"""Models: where they come from, how they are loaded, where their parts are."""
