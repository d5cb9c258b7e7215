"""Two-stream prefill: run a vision-language model's decoder with less work for visual tokens.

Methods add their settings to the `VisualPlan` of a network, which its `VisualEngine` carries out:
each layer computes text rows in full, and visual rows only with the heads, neurons, windows and
layers that the plan keeps. Pruning steps remove visual rows permanently. The KV cache stores visual
tokens separately from text. `masked_mode` is the reference, which computes everything and masks.
"""
