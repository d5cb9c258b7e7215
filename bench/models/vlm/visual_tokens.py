"""Location of the visual tokens of a call, and their cells in frames.

A call is one forward of the multimodal model (the module below the language head). Positions come
from token ids and processor outputs, never from an offset. A call without an image has no visual
tokens, whatever its ids are, as in transformers.

A frame is one rectangle of visual tokens in raster order: a whole image (LLaVA, Qwen2-VL), one tile
(InternVL, Idefics3), all tiles in their places (LLaVA-NeXT), or one time step of a video. Tokens of
an image that represent no part of it, such as the learned newlines of LLaVA-NeXT, are separators
and count as text. Shapes: B rows of a batch, S tokens of one call's sequence, V all visual tokens
of the call in reading order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Literal, cast

import torch
from torch import Tensor, nn

from bench.errors import UserError, unknown_name
from bench.models.network import TransformersNetwork
from bench.models.vlm.frames import FRAME_READERS, PIXELS, CallArguments, Frame

ImageAttention = Literal["causal", "frame", "prompt"]
"""What visual tokens attend to besides earlier tokens: nothing, the rest of their frame, or the
whole prompt, in which case its text does as well."""

# Values in the processors' mm_token_type_ids; 0 is text.
TYPE_IDS = {"image": 1, "video": 2}

# Architectures whose images also attend to later tokens; all others are causal.
BIDIRECTIONAL: dict[str, ImageAttention] = {"gemma3": "frame", "paligemma": "prompt"}


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
    inner = cast(nn.Module, network.model)
    found: VisualTokens | None = None
    for modality in PIXELS:
        if not _has_input(call, modality):
            continue
        mask_BS = _placeholder_mask(network, call, modality)
        if not bool(mask_BS.any()):
            raise UserError(
                f"the call has pixels of modality {modality}, but its prompts have no token for it"
            )
        # Frames of videos are numbered after those of images: numbers identify frames, but are not
        # the reading order across modalities.
        first = 0 if found is None else int(found.frame_BS.max()) + 1
        tokens = assign_frames(mask_BS, family(inner, call, modality, mask_BS), first)
        found = tokens if found is None else merge_visual_tokens(found, tokens)
    return found and replace(found, attention=_image_attention(config.model_type, call))


def _image_attention(model_type: str, call: CallArguments) -> ImageAttention:
    """Return what the call's visual tokens attend to.

    Raises:
        UserError: types of tokens are missing, or mark an answer to learn from.
    """
    types_BS = call.get("token_type_ids")
    # Without types, transformers falls back to causal attention for Gemma 3, and for PaliGemma to
    # attention that depends on padding.
    if model_type not in BIDIRECTIONAL or (types_BS is None and model_type == "gemma3"):
        return "causal"
    if types_BS is None:
        raise UserError("token_type_ids is missing: pass everything that the processor returns")
    if model_type == "paligemma" and bool((types_BS != 0).any()):
        raise UserError(
            "token_type_ids of paligemma mark an answer after the prompt (its suffix), which "
            "visual-token methods do not support: give the prompt alone"
        )
    return BIDIRECTIONAL[model_type]


def _has_input(call: CallArguments, modality: str) -> bool:
    """Return whether the call has pixels, or features of pixels, of this modality."""
    encoded = call.get("mm_encoder_outputs") or {}
    return call.get(PIXELS[modality]) is not None or encoded.get(modality) is not None


def _placeholder_mask(network: nn.Module, call: CallArguments, modality: str) -> Tensor:
    """Return the placeholder tokens of this modality, bool [B, S]."""
    ids_BS = call.get("input_ids")
    token = getattr(network.config, f"{modality}_token_id", None)
    if ids_BS is not None:
        return cast(Tensor, ids_BS == token)
    embedded_BSD = call["inputs_embeds"]
    if call.get("mm_token_type_ids") is not None:
        # `generate` passes the types of the whole sequence, even if a call has only its last
        # tokens.
        types_BS = call["mm_token_type_ids"][:, -embedded_BSD.shape[1] :]
        return cast(Tensor, types_BS == TYPE_IDS[modality])
    embed = cast(TransformersNetwork, network).get_input_embeddings()
    # Without ids or types, placeholders are recognised by their embeddings, exactly, because lookup
    # copies the row.
    placeholder_D = embed(torch.tensor(token, device=embedded_BSD.device))
    return cast(Tensor, (embedded_BSD == placeholder_D).all(dim=-1))


@dataclass(frozen=True)
class VisualTokens:
    """Positions of the visual tokens of one call, int64 of shape [B, S].

    `frame_BS` numbers the frames of the call and is -1 for text and padding; `row_BS` and
    `column_BS` are a token's position in its frame. `separator_BS` (bool) marks text that is part
    of an image, None if there is none. `attention` is what visual tokens attend to.
    """

    frame_BS: Tensor
    row_BS: Tensor
    column_BS: Tensor
    separator_BS: Tensor | None = None
    attention: ImageAttention = "causal"

    @property
    def mask(self) -> Tensor:
        """Mask of visual tokens, bool [B, S]."""
        return self.frame_BS >= 0


def assign_frames(mask_BS: Tensor, frames: Sequence[Frame], first: int = 0) -> VisualTokens:
    """Assign frames to the marked tokens in reading order; numbers start at `first`.

    Raises:
        UserError: the frames do not match the number of marked tokens, or one would span two rows
            of the batch, as after splitting a prompt into chunks.
    """
    areas = [frame.tokens for frame in frames]
    counts = mask_BS.sum(dim=1).tolist()
    # Cumulative counts after each row must be frame boundaries, or a frame would start in one
    # prompt and end in the next. 0 is for leading prompts without an image.
    if sum(areas) != sum(counts) or not set(accumulate(counts)) <= {0, *accumulate(areas)}:
        raise UserError(
            f"the images of this call have {sum(areas)} visual tokens in {len(frames)} frames, but "
            f"its prompts have {counts} image tokens: an image must be in one prompt and one chunk"
        )
    device = mask_BS.device
    area_F = torch.tensor(areas, dtype=torch.int64, device=device)
    # With a separator after every row, a row is one token longer.
    lengths = [frame.columns + (frame.separators == "rows") for frame in frames]
    length_F, rows_F, columns_F = (
        torch.tensor(values, dtype=torch.int64, device=device)
        for values in (lengths, [f.rows for f in frames], [f.columns for f in frames])
    )
    frame_V = torch.repeat_interleave(torch.arange(len(areas), device=device), area_F)
    # Index within the frame: running index minus the first index of its frame. Vectorised, so that
    # a call needs only a few kernels whatever the number of images.
    inside_V = torch.arange(sum(areas), device=device) - (area_F.cumsum(0) - area_F)[frame_V]
    row_V, column_V = inside_V // length_F[frame_V], inside_V % length_F[frame_V]
    between_V = (column_V >= columns_F[frame_V]) | (row_V >= rows_F[frame_V])
    number_V = torch.where(between_V, -1, frame_V + first)
    return VisualTokens(
        frame_BS=_scatter(mask_BS, number_V, -1),
        row_BS=_scatter(mask_BS, row_V.masked_fill(between_V, 0), 0),
        column_BS=_scatter(mask_BS, column_V.masked_fill(between_V, 0), 0),
        separator_BS=_scatter(mask_BS, between_V.long(), 0).bool() if between_V.any() else None,
    )


def merge_visual_tokens(first: VisualTokens, second: VisualTokens) -> VisualTokens:
    """Merge two sets of visual tokens, which must mark different tokens of the same sequences."""
    keep_BS = first.mask
    separators = [s.separator_BS for s in (first, second) if s.separator_BS is not None]
    return VisualTokens(
        frame_BS=torch.where(keep_BS, first.frame_BS, second.frame_BS),
        row_BS=torch.where(keep_BS, first.row_BS, second.row_BS),
        column_BS=torch.where(keep_BS, first.column_BS, second.column_BS),
        separator_BS=torch.stack(separators).any(dim=0) if separators else None,
    )


def _scatter(mask_BS: Tensor, value_V: Tensor, elsewhere: int) -> Tensor:
    """Scatter values to the marked positions in reading order, `elsewhere` to all others."""
    spread_BS = torch.full(mask_BS.shape, elsewhere, dtype=torch.int64, device=mask_BS.device)
    return spread_BS.masked_scatter(mask_BS, value_V)
