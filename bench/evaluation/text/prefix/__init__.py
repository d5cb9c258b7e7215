"""Prefix-sharing backend: common tokens of requests pass through the network only once.

The inputs of a task form a trie of tokens (`trie`). It is divided into packed sequences, each a
part of the trie in depth-first order, and into shared prefixes, which belong to many sequences and
whose keys and values are cached (`packing`). With a tree attention mask every token attends only to
its own path (`forward`). Sequences of similar length form a batch, and the output head is computed
only for scored positions. `scorer` runs all of this; `support` checks which networks allow it.
"""
