"""The size that a split cache should have, from shapes alone."""

from collections.abc import Sequence

from methods.visual_engine.cost.closed_form import DecoderShape, LayerCost, PromptLengths


def expected_cache_bytes(
    shape: DecoderShape, work: Sequence[LayerCost], prompt: PromptLengths, element: int
) -> int:
    """Return bytes of keys and values: text for all heads, visual for kept groups."""
    text = shape.depth * shape.groups * prompt.text
    visual = sum(layer.groups * layer.tokens(prompt) for layer in work)
    return 2 * element * shape.head_dim * (text + visual)
