"""What a run costs: counted sizes and FLOPs, measured time."""
