"""Location of the visual tokens of a call, and their cells in frames.

A call is what the multimodal model (the module below the language head) receives. Positions come
from token ids and processor outputs, never from an offset. A call without an image has no visual
tokens, whatever its ids are: transformers treats it the same way.

A frame is one rectangle of visual tokens in raster order: a whole image (LLaVA, Qwen2-VL), one tile
of it (InternVL), or one time step of a video. Shapes: B rows of a batch, S tokens of one call's
sequence, V all visual tokens of the call in reading order.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from math import isqrt
from typing import Any, cast

import torch
from torch import Tensor, nn

from bench.errors import UserError, unknown_name
from bench.models.network import NetworkConfig, TransformersNetwork

# Tensors, and objects of transformers: the outputs of encoders, the KV cache.
CallArguments = Mapping[str, Any]
PIXELS = {"image": "pixel_values", "video": "pixel_values_videos"}

# Values that processors write into mm_token_type_ids; 0 is text.
TYPE_IDS = {"image": 1, "video": 2}


def locate_visual_tokens(network: nn.Module, call: CallArguments) -> VisualTokens | None:
    """Return the positions of the visual tokens of a call; None if it has no image.

    `network` is the whole model (`...ForConditionalGeneration`), `call` the arguments of its inner
    model.

    Raises:
        UserError: the architecture is unknown, or images and image tokens do not match.
    """
    config = cast(TransformersNetwork, network).config
    family = FRAME_READERS.get(config.model_type)
    if family is None:
        raise unknown_name("multimodal architecture", config.model_type, FRAME_READERS)
    found: VisualTokens | None = None
    for modality in PIXELS:
        if not _has_input(call, modality):
            continue
        mask_BS = _placeholder_mask(network, call, modality)
        if not bool(mask_BS.any()):
            raise UserError(
                f"the call has pixels of modality {modality}, but its prompts have no token for it"
            )
        # Videos are numbered after all images: frame numbers identify frames, they are not the
        # reading order across modalities.
        first = 0 if found is None else int(found.frame_BS.max()) + 1
        tokens = assign_frames(mask_BS, family(config, call, modality, mask_BS), first)
        found = tokens if found is None else merge_visual_tokens(found, tokens)
    return found


def _has_input(call: CallArguments, modality: str) -> bool:
    """Whether the call has pixels, or features computed from pixels, of this modality."""
    encoded = call.get("mm_encoder_outputs") or {}
    return call.get(PIXELS[modality]) is not None or encoded.get(modality) is not None


def _placeholder_mask(network: nn.Module, call: CallArguments, modality: str) -> Tensor:
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
    embed = cast(TransformersNetwork, network).get_input_embeddings()
    # Embeddings without ids or types: a placeholder token is recognised by its embedding, which is
    # exact since lookup copies the row.
    placeholder_D = embed(torch.tensor(token, device=embedded_BSD.device))
    return cast(Tensor, (embedded_BSD == placeholder_D).all(dim=-1))


def _square_frames(
    config: NetworkConfig, call: CallArguments, modality: str, mask_BS: Tensor, side: int
) -> list[Frame]:
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


def _llava_frames(
    config: NetworkConfig, call: CallArguments, modality: str, mask_BS: Tensor
) -> list[Frame]:
    """LLaVA: one square of patches per image; a class token has no position in it."""
    vision = config.vision_config
    if vision.model_type == "clip_vision_model" and config.vision_feature_select_strategy == "full":
        raise UserError(
            "the class token of vision_feature_select_strategy=full has no position in the image's "
            "grid: use the strategy `default`"
        )
    _refuse_size(config, call, (vision.image_size, vision.image_size))
    return _square_frames(config, call, modality, mask_BS, _llava_side(config))


def _internvl_frames(
    config: NetworkConfig, call: CallArguments, modality: str, mask_BS: Tensor
) -> list[Frame]:
    """InternVL: one square of patches per tile, after pixel shuffle."""
    # Tiles arrive flattened into the batch dimension of pixels, so each one counts as a frame.
    _refuse_size(config, call, tuple(config.vision_config.image_size))
    return _square_frames(config, call, modality, mask_BS, _internvl_side(config))


def _qwen_frames(
    config: NetworkConfig, call: CallArguments, modality: str, mask_BS: Tensor
) -> list[Frame]:
    """Qwen-VL: the processor states the number of patches (t, h, w) per image or video."""
    # `generate` encodes images first and then calls the model without these grids; M-RoPE positions
    # hold the same information.
    grids = call.get(f"{modality}_grid_thw")
    if grids is None:
        return _frames_from_positions(call, modality, mask_BS)
    merge = config.vision_config.spatial_merge_size
    return [
        (height // merge, width // merge)
        for time, height, width in grids.tolist()
        for _ in range(time)
    ]


def _frames_from_positions(call: CallArguments, modality: str, mask_BS: Tensor) -> list[Frame]:
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


def fixed_frame_size(network: nn.Module) -> Frame | None:
    """Return rows and columns of a frame if all have the same, None if image sizes vary."""
    config = cast(TransformersNetwork, network).config
    sides = {"llava": _llava_side, "internvl": _internvl_side}
    if config.model_type not in sides:
        return None
    side = sides[config.model_type](config)
    return side, side


def _llava_side(config: NetworkConfig) -> int:
    vision = config.vision_config
    return int(vision.image_size // vision.patch_size)


def _internvl_side(config: NetworkConfig) -> int:
    vision = config.vision_config
    patches = (vision.image_size[0] // vision.patch_size[0]) ** 2
    # Pixel shuffle keeps `downsample_ratio`² of the patches.
    return isqrt(round(patches * config.downsample_ratio**2))


def _refuse_size(config: NetworkConfig, call: CallArguments, size: tuple[int, int]) -> None:
    """Raise if pixels have a different size than the grid."""
    pixels = call.get("pixel_values")
    if pixels is not None and tuple(pixels.shape[-2:]) != size:
        given = "x".join(str(side) for side in pixels.shape[-2:])
        raise UserError(
            f"an image of {given} pixels does not fit the grid of {config.model_type}, which is "
            f"made for {size[0]}x{size[1]}: use the model's own processor"
        )


Frame = tuple[int, int]  # rows, columns of visual tokens
FRAME_READERS: dict[str, Callable[[NetworkConfig, CallArguments, str, Tensor], list[Frame]]] = {
    "llava": _llava_frames,
    "internvl": _internvl_frames,
    "qwen2_vl": _qwen_frames,
    "qwen2_5_vl": _qwen_frames,
    "qwen3_vl": _qwen_frames,
    "qwen3_vl_moe": _qwen_frames,
}


@dataclass(frozen=True)
class VisualTokens:
    """Positions of the visual tokens of one call; all three are int64 of shape [B, S].

    `frame_BS` numbers the frames of the call and is -1 where a token is text or padding; `row_BS`
    and `column_BS` are a token's position inside its frame.
    """

    frame_BS: Tensor
    row_BS: Tensor
    column_BS: Tensor

    @property
    def mask(self) -> Tensor:
        """Visual tokens, bool [B, S]."""
        return self.frame_BS >= 0


def assign_frames(mask_BS: Tensor, frames: Sequence[Frame], first: int = 0) -> VisualTokens:
    """Assign frames to the marked tokens in reading order; numbers start at `first`.

    Raises:
        UserError: the frames do not fill the marked tokens exactly, or one would span two rows of
            the batch, as after cutting a prompt into chunks.
    """
    areas = [rows * columns for rows, columns in frames]
    counts = mask_BS.sum(dim=1).tolist()
    # Cumulative counts after each row must be frame boundaries: otherwise a frame would begin in
    # one prompt and end in the next. 0 stands for leading prompts without an image.
    if sum(areas) != sum(counts) or not set(accumulate(counts)) <= {0, *accumulate(areas)}:
        raise UserError(
            f"the images of this call have {sum(areas)} visual tokens in {len(frames)} frames, but "
            f"its prompts have {counts} image tokens: an image must be in one prompt and one chunk"
        )
    device = mask_BS.device
    area_F = torch.tensor(areas, dtype=torch.int64, device=device)
    width_F = torch.tensor([columns for _, columns in frames], dtype=torch.int64, device=device)
    frame_V = torch.repeat_interleave(torch.arange(len(areas), device=device), area_F)
    # Index within the frame: running index minus the first index of its frame. No loop over frames,
    # so that one call costs a few kernels however many images it has.
    inside_V = torch.arange(sum(areas), device=device) - (area_F.cumsum(0) - area_F)[frame_V]
    width_V = width_F[frame_V]
    return VisualTokens(
        frame_BS=_scatter(mask_BS, frame_V + first, -1),
        row_BS=_scatter(mask_BS, inside_V // width_V, 0),
        column_BS=_scatter(mask_BS, inside_V % width_V, 0),
    )


def merge_visual_tokens(first: VisualTokens, second: VisualTokens) -> VisualTokens:
    """Merge two sets of visual tokens, which must mark different tokens of the same sequences."""
    keep_BS = first.mask
    return VisualTokens(
        frame_BS=torch.where(keep_BS, first.frame_BS, second.frame_BS),
        row_BS=torch.where(keep_BS, first.row_BS, second.row_BS),
        column_BS=torch.where(keep_BS, first.column_BS, second.column_BS),
    )


def _scatter(mask_BS: Tensor, value_V: Tensor, elsewhere: int) -> Tensor:
    """Scatter values to the marked positions in reading order, `elsewhere` to all others."""
    spread_BS = torch.full(mask_BS.shape, elsewhere, dtype=torch.int64, device=mask_BS.device)
    return spread_BS.masked_scatter(mask_BS, value_V)
