"""Frames of a call: rectangles of visual tokens of its images, for every architecture.

Sizes come from pixels, from values of the processor, or from image features, because `generate`
encodes images first and then passes nothing else about them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import isqrt
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import Tensor, nn

from bench.errors import UserError
from bench.models.network import NetworkConfig, TransformersNetwork

# Tensors, or objects of transformers such as encoder outputs and the KV cache.
CallArguments = Mapping[str, Any]
PIXELS = {"image": "pixel_values", "video": "pixel_values_videos"}


class Frame(NamedTuple):
    """Rows and columns of visual tokens, and where separators are: after each row, or the last."""

    rows: int
    columns: int
    separators: Literal["none", "rows", "end"] = "none"

    @property
    def tokens(self) -> int:
        """Number of tokens in the prompt, including separators."""
        extra = {"none": 0, "rows": self.rows, "end": 1}[self.separators]
        return self.rows * self.columns + extra


def _config(inner: nn.Module) -> NetworkConfig:
    return cast(TransformersNetwork, inner).config


def _square_frames(
    config: NetworkConfig, mask_BS: Tensor, side: int, images: int | None
) -> list[Frame]:
    """Return as many square frames of one size as the tokens fill."""
    tokens = int(mask_BS.sum())
    count, rest = divmod(tokens, side * side)
    # The number of pixel tensors reveals counts that match by chance, such as two half images.
    if rest or images not in (None, count):
        brought = "its" if images is None else f"{images}"
        raise UserError(
            f"{config.model_type} has {side}x{side} visual tokens per image or tile, but the call "
            f"has {tokens} image tokens for {brought} images: an image must come in one chunk"
        )
    return [Frame(side, side)] * count


def _pixel_images(call: CallArguments, modality: str) -> int | None:
    """Return the number of images or tiles of a call with pixels."""
    pixels = call.get(PIXELS[modality])
    return None if pixels is None else int(pixels.shape[0])


def _llava_frames(
    inner: nn.Module, call: CallArguments, modality: str, mask_BS: Tensor
) -> list[Frame]:
    """Return LLaVA's frames: one square of patches per image, without the class token."""
    config = _config(inner)
    vision = config.vision_config
    if vision.model_type == "pixtral":
        return _frames_of_rows(inner, call, modality, mask_BS)
    if vision.model_type == "clip_vision_model" and config.vision_feature_select_strategy == "full":
        raise UserError(
            "the class token of vision_feature_select_strategy=full has no position in the image's "
            "grid: use the strategy `default`"
        )
    _refuse_size(config, call, (vision.image_size, vision.image_size))
    images = _pixel_images(call, modality)
    return _square_frames(config, mask_BS, _llava_side(config), images)


def _internvl_frames(
    inner: nn.Module, call: CallArguments, modality: str, mask_BS: Tensor
) -> list[Frame]:
    """Return InternVL's frames: one square of patches per tile, after pixel shuffle."""
    config = _config(inner)
    # Tiles are flattened into the batch dimension of pixels, so each one is a frame.
    _refuse_size(config, call, tuple(config.vision_config.image_size))
    images = _pixel_images(call, modality)
    return _square_frames(config, mask_BS, _internvl_side(config), images)


def _tile_frames(
    inner: nn.Module, call: CallArguments, modality: str, mask_BS: Tensor
) -> list[Frame]:
    """Return the squares of Gemma 3 and Cohere2-Vision: one per image, crop or tile.

    They are counted after pooling or shuffling; separators between squares are text tokens.
    """
    config = _config(inner)
    side = FRAME_SIDES[config.model_type](config)
    return _square_frames(config, mask_BS, side, _pixel_images(call, modality))


def _glm_frames(
    inner: nn.Module, call: CallArguments, modality: str, mask_BS: Tensor
) -> list[Frame]:
    """Return GLM-4V's frames, like Qwen-VL's; it marks frames of videos as images."""
    if modality != "image":
        raise UserError("videos of glm4v are not supported: give their frames as images")
    return _qwen_frames(inner, call, modality, mask_BS)


def _idefics_frames(
    inner: nn.Module, call: CallArguments, modality: str, mask_BS: Tensor
) -> list[Frame]:
    """Return frames of Idefics3 and SmolVLM: a square per tile, then the whole image.

    Pixel shuffle has been applied; tags of tiles and line breaks between them are text tokens.
    """
    config, pixels = _config(inner), call.get(PIXELS[modality])
    side = config.vision_config.image_size // config.vision_config.patch_size // config.scale_factor
    # Samples with fewer tiles are padded with black ones, which the model ignores.
    tiles = None if pixels is None else int((pixels != 0).flatten(2).any(dim=2).sum())
    return _square_frames(config, mask_BS, side, tiles)


def _anyres_frames(
    inner: nn.Module, call: CallArguments, modality: str, mask_BS: Tensor
) -> list[Frame]:
    """Return frames of LLaVA-NeXT and LLaVA-OneVision: a small whole image, then its joined tiles.

    Tiles are joined without padding. Each row of the second frame is followed by a newline, and a
    single frame by one newline. Positions come from the model's own packing of features, so that
    sizes are rounded in the same way.
    """
    config = _config(inner)
    if modality != "image":
        raise UserError(
            f"videos of {config.model_type} are not supported: give their frames as images"
        )
    found = []
    for newline_n in _newlines(inner, call):
        side = config.vision_config.image_size // config.vision_config.patch_size
        ends_n = newline_n[side * side :].nonzero()[:, 0].tolist()
        if len(ends_n) == 1:
            found.append(Frame(side, side, "end"))
        else:
            found += [Frame(side, side), Frame(len(ends_n), ends_n[0], "rows")]
    return found


def _newlines(inner: Any, call: CallArguments) -> list[Tensor]:
    """Return a mask of newlines among the tokens of each image of a call, bool [tokens]."""
    encoded = (call.get("mm_encoder_outputs") or {}).get("image")
    if encoded is not None:
        # `generate` encodes images first and drops sizes. A newline is a copy of one parameter.
        return [
            (features_nD == inner.image_newline.to(features_nD)).all(dim=-1)
            for features_nD in encoded.pooler_output
        ]
    from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

    config, sizes = inner.config, call.get("image_sizes")
    if sizes is None:
        raise UserError("image_sizes is missing: pass everything that the processor returns")
    side = config.vision_config.image_size // config.vision_config.patch_size
    # OneVision does not cut images of prompts with several images.
    several = call.get("batch_num_images")
    whole = [n != 1 for n in several.tolist() for _ in range(n)] if several is not None else None
    tiles = [
        1
        if whole is not None and whole[number]
        else image_size_to_num_patches(
            size, config.image_grid_pinpoints, config.vision_config.image_size
        )
        for number, size in enumerate(sizes)
    ]
    # Packed like the model's features: zeros for patches, and ones for newlines.
    blank = [torch.zeros(count, side * side, 1, device=sizes.device) for count in tiles]
    newline = torch.ones(1, device=sizes.device)
    settings = {"image_newline": newline}
    if config.model_type == "llava_next":
        settings["vision_feature_select_strategy"] = config.vision_feature_select_strategy
    elif hasattr(config, "vision_aspect_ratio"):
        settings["vision_aspect_ratio"] = config.vision_aspect_ratio
    packed, _ = inner.pack_image_features(blank, sizes, **settings)
    return [image_n1[:, 0] == 1 for image_n1 in packed]


def _frames_of_rows(
    inner: nn.Module, call: CallArguments, modality: str, mask_BS: Tensor
) -> list[Frame]:
    """Return frames of Mistral 3 and Pixtral: rows of tokens, with a break after each."""
    config = _config(inner)
    # Lengths of the rows over all prompts; no row continues in the next prompt.
    edges_BS = torch.nn.functional.pad(mask_BS, (1, 1)).int().diff(dim=1)
    starts, stops = (edges_BS == 1).nonzero()[:, 1], (edges_BS == -1).nonzero()[:, 1]
    runs = (stops - starts).tolist()
    frames = []
    for count in _tokens_of_images(config, call):
        width, rows = (runs[0] if runs else 0), 0
        while runs and runs[0] == width and rows * width < count:
            rows += 1
            runs.pop(0)
        if not width or rows * width != count:
            raise UserError(
                f"an image of this {config.model_type} has {count} visual tokens, but its prompt "
                f"has {rows} rows of {width}: an image must come in one chunk"
            )
        frames.append(Frame(rows, width))
    return frames


def _tokens_of_images(config: NetworkConfig, call: CallArguments) -> list[int]:
    """Return the number of visual tokens of each image, for architectures with variable sizes."""
    encoded = (call.get("mm_encoder_outputs") or {}).get("image")
    if encoded is not None:
        return [len(features) for features in encoded.pooler_output]
    sizes = call.get("image_sizes")
    if sizes is None:
        raise UserError("image_sizes is missing: pass everything that the processor returns")
    step = config.vision_config.patch_size * getattr(config, "spatial_merge_size", 1)
    return [(height // step) * (width // step) for height, width in torch.as_tensor(sizes).tolist()]


def _qwen_frames(
    inner: nn.Module, call: CallArguments, modality: str, mask_BS: Tensor
) -> list[Frame]:
    """Return Qwen-VL's frames: the processor states patches (t, h, w) per image or video."""
    # `generate` encodes images first and then calls the model without these grids; M-RoPE positions
    # contain the same information.
    grids = call.get(f"{modality}_grid_thw")
    if grids is None:
        return _frames_from_positions(call, modality, mask_BS)
    merge = _config(inner).vision_config.spatial_merge_size
    return [
        Frame(height // merge, width // merge)
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
    # The variant with four rows starts with plain text positions.
    places_3V = positions[-3:].expand(-1, *mask_BS.shape)[:, mask_BS]
    frames = []
    for image_3V in places_3V.split([len(features) for features in encoded.pooler_output], dim=1):
        # Features give the number of tokens per image or video; within one, a change of the time
        # position starts a new frame.
        changes = (image_3V[0].diff() != 0).nonzero()[:, 0] + 1
        for frame_3V in image_3V.tensor_split(changes.cpu(), dim=1):
            span = frame_3V.amax(dim=1) - frame_3V.amin(dim=1) + 1
            frames.append(Frame(int(span[1]), int(span[2])))
    return frames


def fixed_frame_size(network: nn.Module) -> Frame | None:
    """Return rows and columns of a frame if all frames have the same size, else None."""
    config = cast(TransformersNetwork, network).config
    if config.model_type not in FRAME_SIDES or config.vision_config.model_type == "pixtral":
        return None
    side = FRAME_SIDES[config.model_type](config)
    return Frame(side, side)


def _llava_side(config: NetworkConfig) -> int:
    vision = config.vision_config
    return int(vision.image_size // vision.patch_size)


def _cohere_side(config: NetworkConfig) -> int:
    vision = config.vision_config
    return int(vision.image_size // vision.patch_size // config.downsample_factor)


def _gemma_side(config: NetworkConfig) -> int:
    return isqrt(config.mm_tokens_per_image)


def _internvl_side(config: NetworkConfig) -> int:
    vision = config.vision_config
    patches = (vision.image_size[0] // vision.patch_size[0]) ** 2
    # Pixel shuffle reduces the number of patches by `downsample_ratio`².
    return isqrt(round(patches * config.downsample_ratio**2))


# Number of rows, and of columns, of the square frames of an architecture.
FRAME_SIDES: dict[str, Callable[[NetworkConfig], int]] = {
    "llava": _llava_side,
    "internvl": _internvl_side,
    "deepseek_vl": _llava_side,
    "cohere2_vision": _cohere_side,
    "gemma3": _gemma_side,
    "paligemma": _llava_side,
}


def _refuse_size(config: NetworkConfig, call: CallArguments, size: tuple[int, int]) -> None:
    """Raise if the size of pixels does not match the grid."""
    pixels = call.get("pixel_values")
    if pixels is not None and tuple(pixels.shape[-2:]) != size:
        given = "x".join(str(side) for side in pixels.shape[-2:])
        raise UserError(
            f"an image of {given} pixels does not fit the grid of {config.model_type}, which is "
            f"made for {size[0]}x{size[1]}: use the model's own processor"
        )


FrameReader = Callable[[nn.Module, CallArguments, str, Tensor], list[Frame]]
FRAME_READERS: dict[str, FrameReader] = {
    "llava": _llava_frames,
    "llava_next": _anyres_frames,
    "llava_onevision": _anyres_frames,
    "internvl": _internvl_frames,
    "idefics3": _idefics_frames,
    "smolvlm": _idefics_frames,
    "mistral3": _frames_of_rows,
    "deepseek_vl": _llava_frames,
    "cohere2_vision": _tile_frames,
    "gemma3": _tile_frames,
    "glm4v": _glm_frames,
    "paligemma": _llava_frames,
    "qwen2_vl": _qwen_frames,
    "qwen2_5_vl": _qwen_frames,
    "qwen3_vl": _qwen_frames,
    "qwen3_vl_moe": _qwen_frames,
}

# Reasons why some popular architectures are not supported.
RECURRENT = (
    "three of four layers are recurrent: text reads their state, which every visual token changes"
)
REFUSED_ARCHITECTURES = {"qwen3_5": RECURRENT, "qwen3_5_moe": RECURRENT}
