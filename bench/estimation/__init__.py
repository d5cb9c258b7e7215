"""What a run costs before it runs: time, memory, downloads and energy, from shapes alone."""
