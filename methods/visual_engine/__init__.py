"""Two-stream prefill: a vision-language model's decoder run with less work for visual tokens.

Methods add what they want to a network's `VisualPlan`, and the network's `VisualEngine` carries it
out: each layer computes text rows in full and visual rows with the heads, neurons, windows and
layers that the plan leaves them; pruning steps remove visual rows for good. The KV cache keeps
visual tokens apart from text. `masked_mode` computes everything and masks instead.
"""
