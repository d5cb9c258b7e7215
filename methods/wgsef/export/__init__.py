"""Taking dead groups out of a network for good, and handing the small network on."""
