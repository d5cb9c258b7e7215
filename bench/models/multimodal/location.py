"""Positions of visual tokens in a call, from token ids and processor outputs, never an offset.

A call is what the multimodal model (the module below the language head) receives. A call without an
image has no visual tokens, whatever its ids are: transformers treats it the same way. Shapes: B
rows of a batch, S tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import isqrt
from typing import Any, cast

import torch
from torch import Tensor, nn

from bench.errors import UserError, unknown
from bench.models.multimodal.frames import Frame, VisualTokens, join, place

Call = Mapping[str, Any]
PIXELS = {"image": "pixel_values", "video": "pixel_values_videos"}
# Values that processors write into mm_token_type_ids; 0 is text.
TYPE_IDS = {"image": 1, "video": 2}


def locate(network: nn.Module, call: Call) -> VisualTokens | None:
    """Return the positions of the visual tokens of a call; None if it has no image.

    `network` is the whole model (`...ForConditionalGeneration`), `call` the arguments of its inner
    model.

    Raises:
        UserError: the architecture is unknown, or images and image tokens do not match.
    """
    config = cast(Any, network.config)
    family = FAMILIES.get(config.model_type)
    if family is None:
        raise unknown("multimodal architecture", config.model_type, FAMILIES)
    found: VisualTokens | None = None
    for modality in PIXELS:
        if not _brings(call, modality):
            continue
        mask_BS = _marked(network, call, modality)
        if not bool(mask_BS.any()):
            raise UserError(
                f"the call has pixels of modality {modality}, but its prompts have no token for it"
            )
        # Videos are numbered after all images: frame numbers identify frames, they are not the
        # reading order across modalities.
        first = 0 if found is None else int(found.frame_BS.max()) + 1
        tokens = place(mask_BS, family(config, call, modality, mask_BS), first)
        found = tokens if found is None else join(found, tokens)
    return found


def _brings(call: Call, modality: str) -> bool:
    """Whether the call has pixels, or features computed from pixels, of this modality."""
    encoded = call.get("mm_encoder_outputs") or {}
    return call.get(PIXELS[modality]) is not None or encoded.get(modality) is not None


def _marked(network: nn.Module, call: Call, modality: str) -> Tensor:
    """Return the tokens that stand for this modality, bool [B, S]."""
    ids_BS = call.get("input_ids")
    token = getattr(network.config, f"{modality}_token_id", None)
    if ids_BS is not None:
        return cast(Tensor, ids_BS == token)
    embedded_BSD = call["inputs_embeds"]
    if call.get("mm_token_type_ids") is not None:
        # `generate` passes the types of the whole sequence, also to calls that hold only its last
        # tokens.
        types_BS = call["mm_token_type_ids"][:, -embedded_BSD.shape[1] :]
        return cast(Tensor, types_BS == TYPE_IDS[modality])
    embed = cast(Any, network).get_input_embeddings()
    # Embeddings without ids or types: a placeholder token is recognised by its embedding, which is
    # exact since lookup copies the row.
    placeholder_D = embed(torch.tensor(token, device=embedded_BSD.device))
    return cast(Tensor, (embedded_BSD == placeholder_D).all(dim=-1))


def _squares(config: Any, call: Call, modality: str, mask_BS: Tensor, side: int) -> list[Frame]:
    """Return square frames of one size, as many as the tokens fill."""
    tokens = int(mask_BS.sum())
    count, rest = divmod(tokens, side * side)
    pixels = call.get(PIXELS[modality])
    # A count that fits by chance (two half images) is caught by the number of pixel tensors.
    if rest or (pixels is not None and pixels.shape[0] != count):
        brought = "its" if pixels is None else f"{pixels.shape[0]}"
        raise UserError(
            f"{config.model_type} has {side}x{side} visual tokens per image or tile, but the call "
            f"has {tokens} image tokens for {brought} images: an image must come in one chunk"
        )
    return [(side, side)] * count


def _llava(config: Any, call: Call, modality: str, mask_BS: Tensor) -> list[Frame]:
    """LLaVA: one square of patches per image; a class token has no position in it."""
    vision = config.vision_config
    if vision.model_type == "clip_vision_model" and config.vision_feature_select_strategy == "full":
        raise UserError(
            "the class token of vision_feature_select_strategy=full has no position in the image's "
            "grid: use the strategy `default`"
        )
    _refuse_size(config, call, (vision.image_size, vision.image_size))
    return _squares(config, call, modality, mask_BS, vision.image_size // vision.patch_size)


def _internvl(config: Any, call: Call, modality: str, mask_BS: Tensor) -> list[Frame]:
    """InternVL: one square of patches per tile, after pixel shuffle."""
    vision = config.vision_config
    # Tiles arrive flattened into the batch dimension of pixels, so each one counts as a frame.
    _refuse_size(config, call, tuple(vision.image_size))
    patches = (vision.image_size[0] // vision.patch_size[0]) ** 2
    side = isqrt(round(patches * config.downsample_ratio**2))
    return _squares(config, call, modality, mask_BS, side)


def _qwen(config: Any, call: Call, modality: str, mask_BS: Tensor) -> list[Frame]:
    """Qwen-VL: the processor states the number of patches (t, h, w) per image or video."""
    # `generate` encodes images first and then calls the model without these grids; M-RoPE positions
    # hold the same information.
    grids = call.get(f"{modality}_grid_thw")
    if grids is None:
        return _from_positions(call, modality, mask_BS)
    merge = config.vision_config.spatial_merge_size
    return [
        (height // merge, width // merge)
        for time, height, width in grids.tolist()
        for _ in range(time)
    ]


def _from_positions(call: Call, modality: str, mask_BS: Tensor) -> list[Frame]:
    """Derive frames from M-RoPE positions (time, row, column), [3 or 4, B, S]."""
    positions = call.get("position_ids")
    encoded = (call.get("mm_encoder_outputs") or {}).get(modality)
    if positions is None or positions.ndim != 3 or encoded is None:
        raise UserError(
            f"{modality}_grid_thw is missing: pass everything that the processor returns"
        )
    # The variant with four rows has plain text positions first.
    places_3V = positions[-3:].expand(-1, *mask_BS.shape)[:, mask_BS]
    frames = []
    for image_3V in places_3V.split([len(features) for features in encoded.pooler_output], dim=1):
        # Features give the number of tokens per image or video; within one, a frame ends where the
        # time position changes.
        changes = (image_3V[0].diff() != 0).nonzero()[:, 0] + 1
        for frame_3V in image_3V.tensor_split(changes.cpu(), dim=1):
            span = frame_3V.amax(dim=1) - frame_3V.amin(dim=1) + 1
            frames.append((int(span[1]), int(span[2])))
    return frames


def frame_size(config: Any) -> Frame | None:
    """Return rows and columns of a frame if all have the same, None if image sizes vary."""
    vision = config.vision_config
    if config.model_type == "llava":
        side = vision.image_size // vision.patch_size
    elif config.model_type == "internvl":
        patches = (vision.image_size[0] // vision.patch_size[0]) ** 2
        side = isqrt(round(patches * config.downsample_ratio**2))
    else:
        return None
    return side, side


def _refuse_size(config: Any, call: Call, size: tuple[int, int]) -> None:
    """Raise if pixels have a different size than the grid."""
    pixels = call.get("pixel_values")
    if pixels is not None and tuple(pixels.shape[-2:]) != size:
        given = "x".join(str(side) for side in pixels.shape[-2:])
        raise UserError(
            f"an image of {given} pixels does not fit the grid of {config.model_type}, which is "
            f"made for {size[0]}x{size[1]}: use the model's own processor"
        )


FAMILIES: dict[str, Callable[[Any, Call, str, Tensor], list[Frame]]] = {
    "llava": _llava,
    "internvl": _internvl,
    "qwen2_vl": _qwen,
    "qwen2_5_vl": _qwen,
    "qwen3_vl": _qwen,
    "qwen3_vl_moe": _qwen,
}
