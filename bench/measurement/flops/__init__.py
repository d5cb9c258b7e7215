"""FLOPs of a call: counted, by arithmetic from shapes, and by papers' conventions."""
