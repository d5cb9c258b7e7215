"""Analytic cost of vision tower and projector: every patch passes every layer of the tower.

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
    """Return the multiply-adds of encoding the images of a call into `tokens` visual tokens.

    Raises:
        UserError: the vision tower is of an unsupported type.
    """
    config = cast(Any, network.config)
    module, _, projector = watched(network)
    if config.model_type in CLASS_TOKEN:
        # These towers take images of one size, so the patches divide evenly among the images.
        # Qwen's towers take any size and receive a (time, height, width) grid per image instead.
        patches = tokens * merging(config)
        images = int(inputs["pixel_values"].shape[0])
        encoded = _class_token(module, patches // images, images)
    else:
        grids = [row for name in GRIDS for row in _rows(inputs.get(name))]
        encoded = _patches(module, config, grids)
    return [*encoded, *_projectors(module, projector, tokens)]


def _class_token(module: nn.Module, patches: int, images: int) -> Iterator[Product]:
    """Yield a tower in which the class token and all patches of an image attend to each other."""
    part = cast(Any, module)
    embedding = next(m for m in part.embeddings.modules() if isinstance(m, nn.Conv2d))
    yield Product("vision", float(images * patches * weights(embedding)), "visual")
    rows = patches + 1
    # CLIP names these `layers` and `self_attn`, InternVL's tower `layer` and `attention`.
    for layer in getattr(part.encoder, "layers", None) or part.encoder.layer:
        attention = getattr(layer, "self_attn", None) or layer.attention
        # Multiply-adds per (query, key) pair: q · k and weight · v, over all heads.
        per_pair = 2 * attention.num_heads * attention.head_dim
        yield Product("vision", float(images * rows * weights(layer)), "visual")
        pairs = images * rows * rows
        yield attended("visual", pairs, pairs, per_pair, part="vision")


def _patches(module: nn.Module, config: Any, grids: Sequence[Sequence[int]]) -> Iterator[Product]:
    """Yield a tower without class token; attention covers a frame or, in some layers, a window."""
    part, vision = cast(Any, module), config.vision_config
    frames = [height * width for time, height, width in grids for _ in range(time)]
    patches = sum(frames)
    yield Product("vision", float(patches * weights(part.patch_embed)), "visual")
    # Qwen2.5-VL lists the few layers with full attention; without the list every layer has it.
    full = getattr(vision, "fullatt_block_indexes", None)
    windows = frames if full is None else _windows(vision, grids)
    for index, block in enumerate(part.blocks):
        lengths = frames if full is None or index in full else windows
        pairs = sum(length * length for length in lengths)
        yield Product("vision", float(patches * weights(block)), "visual")
        # qkv is one fused matrix: a third of its outputs is the width of q, of k and of v.
        per_pair = 2 * block.attn.qkv.out_features // 3
        yield attended("visual", pairs, pairs, per_pair, part="vision")


def _windows(vision: Any, grids: Sequence[Sequence[int]]) -> list[int]:
    """Return the number of patches per window; those at the right and lower edge are smaller.

    A window is a square of whole visual tokens, counted in patches here.
    """
    # Rounded down to whole merged tokens as Qwen2.5-VL does, then converted back to patches.
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
    """Yield the projector and DeepStack's mergers, which project features of inner tower layers."""
    yield Product("projector", float(tokens * weights(projector)), "visual")
    for merger in getattr(module, "deepstack_merger_list", None) or ():
        yield Product("projector", float(tokens * weights(merger)), "visual")


def _rows(grid: Tensor | None) -> list[list[int]]:
    if grid is None:
        return []
    rows: list[list[int]] = grid.tolist()
    if any(len(row) != 3 for row in rows):
        raise UserError(f"expected patch grids of (time, height, width), got {rows[0]}")
    return rows
