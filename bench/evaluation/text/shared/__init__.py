"""Scoring requests that begin alike: what they share goes through the network once.

Inputs of a task form a trie of tokens (`trie`). It is cut into rows, each a piece of the trie
written out depth first, and into trunks, long beginnings of many rows whose keys and values are
kept (`groves`, `trunk`). A mask lets every token see its own path only (`rows`, `mask`). Rows of
like width go through the network together, and only the positions that are asked about meet the
head (`forward`, `reading`). `scoring` does it; `fitness` says which networks cannot be asked so.
"""
