"""Physical removal of dead groups, and export of the smaller network."""
