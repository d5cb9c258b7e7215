"""NAEE (arXiv 2402.14800): the set of experts whose absence changes a block's output least."""
