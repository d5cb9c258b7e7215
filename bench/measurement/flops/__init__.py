"""FLOPs of a call: counted, computed from shapes, and by papers' conventions."""
