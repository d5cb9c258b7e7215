"""Analytic multiply-adds of prompts with images: vision tower, projector and decoder.

Every patch passes through every layer of the tower, unless a method removes some in between.

Shapes: P patches of a frame, c patches merged into a visual token.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from bench.data.chat import ModelInputs
from bench.errors import UserError
from bench.measurement.flops.analytic import CallTokens, decoder_macs, head_macs
from bench.models.macs import (
    MatmulCost,
    VisualLayer,
    attention_cost,
    flops_provider_of,
    matrix_weights,
)
from bench.models.network import text_config
from bench.models.structure.model_structure import ModelStructure
from bench.models.vlm.tower_pass import CLASS_TOKEN_MODELS, patches_per_token
from bench.models.vlm.vision_tower import tower_parts
from bench.models.vlm.visual_tokens import VisualTokens, locate_visual_tokens

if TYPE_CHECKING:
    from transformers import PretrainedConfig


@torch.no_grad()
def image_prompt_macs(
    network: nn.Module, structure: ModelStructure, inputs: ModelInputs
) -> list[MatmulCost]:
    """Return the multiply-adds of a prompt with its images and of the logits of its last token.

    Raises:
        UserError: there is no image, or a part has no analytic FLOP formula.
    """
    marked = _require_visual_tokens(network, inputs).mask
    # A method that skips work stores its own FLOP account on the network, which returns None if the
    # stock decoder is unchanged.
    plan = flops_provider_of(network)
    planned = None if plan is None else plan.prefill(inputs)
    if planned is None:
        planned = list(
            decoder_macs(structure.layers, text_config(network), CallTokens.prompt(marked))
        )
    rows = None if plan is None else plan.tower_rows(inputs)
    vision = vision_macs(network, inputs, int(marked.sum()), rows)
    return [*vision, *planned, head_macs(network, len(marked))]


@torch.no_grad()
def token_after_prompt_macs(
    network: nn.Module, structure: ModelStructure, inputs: ModelInputs
) -> list[MatmulCost]:
    """Return the multiply-adds of the first token generated after a prompt.

    Raises:
        UserError: there is no image, or the decoder has no analytic FLOP formula.
    """
    batch, length = _require_visual_tokens(network, inputs).mask.shape
    plan = flops_provider_of(network)
    planned = None if plan is None else plan.token(inputs)
    if planned is None:
        tokens = CallTokens.text(batch, 1, past=length)
        planned = list(decoder_macs(structure.layers, text_config(network), tokens))
    return [*planned, head_macs(network, batch)]


@torch.no_grad()
def visual_layers(
    network: nn.Module, structure: ModelStructure, inputs: ModelInputs
) -> list[VisualLayer]:
    """Return per decoder layer the quantities that papers' FLOP conventions use."""
    plan = flops_provider_of(network)
    if plan is not None:
        return plan.layers(inputs)
    # Without a method every layer processes all visual tokens with all heads and neurons.
    visual = int(_require_visual_tokens(network, inputs).mask.sum())
    return [VisualLayer(visual)] * len(structure.layers)


def _require_visual_tokens(network: nn.Module, inputs: ModelInputs) -> VisualTokens:
    tokens = locate_visual_tokens(network, inputs)
    if tokens is None:
        raise UserError("the inputs contain no image, so there are no visual tokens to count")
    return tokens


GRID_INPUTS = ("image_grid_thw", "video_grid_thw")


def vision_macs(
    network: nn.Module, inputs: ModelInputs, tokens: int, rows: Sequence[int] | None = None
) -> list[MatmulCost]:
    """Return the multiply-adds of encoding the images of a call into `tokens` visual tokens.

    `rows` are the rows per image in each layer of the tower if a method removes some.

    Raises:
        UserError: the type of the vision tower is not supported.
    """
    config = cast("PretrainedConfig", network.config)
    if config.model_type in TILED:
        return list(_tiled_images(network, inputs))
    module, _, projector = tower_parts(network)
    if config.model_type in CLASS_TOKEN_MODELS:
        # These towers take images of one size, so patches are divided evenly among images. Qwen's
        # towers take any size and get a (time, height, width) grid per image instead.
        patches = tokens * patches_per_token(config)
        images = int(inputs["pixel_values"].shape[0])
        encoded = _class_token_tower(module, patches // images, images, rows)
        # Removed patches and the class token do not reach the projector.
        tokens = tokens if rows is None else images * (rows[-1] - 1)
    else:
        grids = [row for name in GRID_INPUTS for row in _grid_rows(inputs.get(name))]
        encoded = _patch_tower(module, config, grids)
    return [*encoded, *_projector_macs(module, projector, tokens)]


# Models whose towers see tiles of one size, and the names of their towers and projectors.
TILED = {
    "llava_next": ("vision_tower", "multi_modal_projector"),
    "llava_onevision": ("vision_tower", "multi_modal_projector"),
    "idefics3": ("vision_model", "connector"),
    "smolvlm": ("vision_model", "connector"),
}


def _tiled_images(network: nn.Module, inputs: ModelInputs) -> Iterator[MatmulCost]:
    """Yield the tower and the projector, which process all patches of a tile including padding."""
    config = cast(Any, network).config
    module, projector = (
        cast(nn.Module, network.model).get_submodule(name) for name in TILED[config.model_type]
    )
    # Samples and images with fewer tiles are padded with black ones, which the tower never sees.
    tiles = int((inputs["pixel_values"] != 0).flatten(2).any(dim=2).sum())
    patches = (config.vision_config.image_size // config.vision_config.patch_size) ** 2
    class_token = hasattr(cast(Any, module).embeddings, "class_embedding")
    yield from _full_tower(module, patches, tiles, patches + class_token)
    merged = getattr(config, "scale_factor", 1) ** 2
    yield from _projector_macs(module, projector, tiles * patches // merged)


def _class_token_tower(
    module: nn.Module, patches: int, images: int, left: Sequence[int] | None
) -> Iterator[MatmulCost]:
    """Yield a tower in which the class token and the patches of an image attend to each other."""
    return _full_tower(module, patches, images, patches + 1, left)


def _full_tower(
    module: nn.Module, patches: int, images: int, rows: int, left: Sequence[int] | None = None
) -> Iterator[MatmulCost]:
    """Yield a tower in which all rows of an image, patches and others, attend to each other.

    `left` are the rows of each layer if layers have different numbers.
    """
    part = cast(Any, module)
    embedding = next(m for m in part.embeddings.modules() if isinstance(m, nn.Conv2d))
    yield MatmulCost("vision", float(images * patches * matrix_weights(embedding)), "visual")
    # CLIP names these `layers` and `self_attn`, InternVL's tower `layer` and `attention`.
    layers = getattr(part.encoder, "layers", None) or part.encoder.layer
    for layer, present in zip(layers, left or [rows] * len(layers), strict=True):
        attention = getattr(layer, "self_attn", None) or layer.attention
        # Multiply-adds per (query, key) pair: q · k and weight · v, over all heads.
        per_pair = 2 * attention.num_heads * attention.head_dim
        yield MatmulCost("vision", float(images * present * matrix_weights(layer)), "visual")
        pairs = images * present * present
        yield attention_cost("visual", pairs, pairs, per_pair, part="vision")


def _patch_tower(
    module: nn.Module, config: PretrainedConfig, grids: Sequence[Sequence[int]]
) -> Iterator[MatmulCost]:
    """Yield a tower without class token; attention covers a frame or, in some layers, a window."""
    part, vision = cast(Any, module), config.vision_config
    frames = [height * width for time, height, width in grids for _ in range(time)]
    patches = sum(frames)
    yield MatmulCost("vision", float(patches * matrix_weights(part.patch_embed)), "visual")
    # Qwen2.5-VL lists the few layers with full attention; without the list all layers have it.
    full = getattr(vision, "fullatt_block_indexes", None)
    windows = frames if full is None else _window_sizes(vision, grids)
    for index, block in enumerate(part.blocks):
        lengths = frames if full is None or index in full else windows
        pairs = sum(length * length for length in lengths)
        yield MatmulCost("vision", float(patches * matrix_weights(block)), "visual")
        # qkv is one fused matrix, with a third of its outputs each for q, k and v.
        per_pair = 2 * block.attn.qkv.out_features // 3
        yield attention_cost("visual", pairs, pairs, per_pair, part="vision")


def _window_sizes(vision: PretrainedConfig, grids: Sequence[Sequence[int]]) -> list[int]:
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


def _projector_macs(module: nn.Module, projector: nn.Module, tokens: int) -> Iterator[MatmulCost]:
    """Yield the projector and DeepStack's mergers, which project features of inner tower layers."""
    yield MatmulCost("projector", float(tokens * matrix_weights(projector)), "visual")
    for merger in getattr(module, "deepstack_merger_list", None) or ():
        yield MatmulCost("projector", float(tokens * matrix_weights(merger)), "visual")


def _grid_rows(grid: Tensor | None) -> list[list[int]]:
    if grid is None:
        return []
    rows: list[list[int]] = grid.tolist()
    if any(len(row) != 3 for row in rows):
        raise UserError(f"expected patch grids of (time, height, width), got {rows[0]}")
    return rows
