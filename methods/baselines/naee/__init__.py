"""NAEE (arXiv 2402.14800): remove the set of experts that changes the block output least."""
