"""Prefix-sharing backend: tokens that requests have in common go through the network once.

The inputs of a task form a trie of tokens (`trie`). It is cut into packed sequences, each a part of
the trie written depth first, and into shared prefixes, which many sequences have in common and
whose keys and values are cached (`packing`). A tree attention mask lets every token see only its
own path (`forward`). Sequences of similar length form a batch, and only scored positions meet the
output head. `scorer` drives it; `support` checks which networks it works for.
"""
