"""The vision tower and the projector: every patch through every layer of the tower.

Shapes: P patches of a frame, c patches merged into a visual token.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

from torch import Tensor, nn

from bench.errors import UserError
from bench.models.multimodal.tower import CLASS_TOKEN, merging, watched
from bench.models.products import Product, attended, weights

GRIDS = ("image_grid_thw", "video_grid_thw")


def tower(network: nn.Module, inputs: Mapping[str, Any], tokens: int) -> list[Product]:
    """Return the products of encoding a call's images into so many visual tokens.

    Raises:
        UserError: the tower is of a kind that is not understood.
    """
    config = cast(Any, network.config)
    module, _, projector = watched(network)
    if config.model_type in CLASS_TOKEN:
        patches = tokens * merging(config)
        images = int(inputs["pixel_values"].shape[0])
        encoded = _class_token(module, patches // images, images)
    else:
        grids = [row for name in GRIDS for row in _rows(inputs.get(name))]
        encoded = _patches(module, config, grids)
    return [*encoded, *_projectors(module, projector, tokens)]


def _class_token(module: nn.Module, patches: int, images: int) -> Iterator[Product]:
    """Yield a tower in which a class token and all patches of an image see each other."""
    part = cast(Any, module)
    embedding = next(m for m in part.embeddings.modules() if isinstance(m, nn.Conv2d))
    yield Product("vision", float(images * patches * weights(embedding)), "visual")
    rows = patches + 1
    for layer in getattr(part.encoder, "layers", None) or part.encoder.layer:
        attention = getattr(layer, "self_attn", None) or layer.attention
        per_pair = 2 * attention.num_heads * attention.head_dim
        yield Product("vision", float(images * rows * weights(layer)), "visual")
        pairs = images * rows * rows
        yield attended("visual", pairs, pairs, per_pair, part="vision")


def _patches(module: nn.Module, config: Any, grids: Sequence[Sequence[int]]) -> Iterator[Product]:
    """Yield a tower of patches alone, which see their frame or, in some layers, a window of it."""
    part, vision = cast(Any, module), config.vision_config
    frames = [height * width for time, height, width in grids for _ in range(time)]
    patches = sum(frames)
    yield Product("vision", float(patches * weights(part.patch_embed)), "visual")
    full = getattr(vision, "fullatt_block_indexes", None)
    windows = frames if full is None else _windows(vision, grids)
    for index, block in enumerate(part.blocks):
        lengths = frames if full is None or index in full else windows
        pairs = sum(length * length for length in lengths)
        yield Product("vision", float(patches * weights(block)), "visual")
        per_pair = 2 * block.attn.qkv.out_features // 3
        yield attended("visual", pairs, pairs, per_pair, part="vision")


def _windows(vision: Any, grids: Sequence[Sequence[int]]) -> list[int]:
    """Return the patches of every window; those at the right and lower border are smaller.

    A window is a square of whole visual tokens, counted in patches here.
    """
    side = vision.window_size // vision.patch_size // vision.spatial_merge_size
    side *= vision.spatial_merge_size
    found = []
    for time, height, width in grids:
        for top in range(0, height, side):
            for left in range(0, width, side):
                area = min(side, height - top) * min(side, width - left)
                found += [area] * time
    return found


def _projectors(module: nn.Module, projector: nn.Module, tokens: int) -> Iterator[Product]:
    """Yield the projector, and those that DeepStack has for layers in between."""
    yield Product("projector", float(tokens * weights(projector)), "visual")
    for merger in getattr(module, "deepstack_merger_list", None) or ():
        yield Product("projector", float(tokens * weights(merger)), "visual")


def _rows(grid: Tensor | None) -> list[list[int]]:
    """Return the rows (time, height, width) of a grid of patches."""
    if grid is None:
        return []
    rows: list[list[int]] = grid.tolist()
    if any(len(row) != 3 for row in rows):
        raise UserError(f"a grid of patches has (time, height, width), not {rows[0]}")
    return rows
