"""Inputs of a pruning step that chooses among visual tokens, and its result.

Shapes: B samples, I frames, M visual tokens of a frame, T text rows, R some of them, N visual rows
of the call, D d_model, h query heads that attend to visual tokens, K visual and text keys, d a
head's width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from bench.errors import UserError
from bench.models.vlm.vision_tower import TowerOutput
from methods.visual_engine.attention import StreamQKV, kv_heads_for, select_heads
from methods.visual_engine.masks import AttentionMasks
from methods.visual_engine.token_index import Cells, Frames, TokenRows, rows_after_images
from methods.visual_engine.weight_slices import VisualWeights


@dataclass(frozen=True)
class TokenSelection:
    """Tokens of each frame that are kept, bool [I, M], and new states for some of them.

    `states_IMD` replaces the states marked by `changed_IM`, which are tokens into which others were
    merged. If a method returns tokens in an order other than reading order, `order_IM` sorts those
    of a frame; it has an effect only if positions are renumbered. `weight_IM` is the number of
    tokens that each one stands for as a key in later layers: log w is added to its products with
    queries (proportional attention).
    """

    keep_IM: Tensor
    changed_IM: Tensor | None = None
    states_IMD: Tensor | None = None
    order_IM: Tensor | None = None
    weight_IM: Tensor | None = None


@dataclass(frozen=True)
class LayerQK:
    """Queries and keys of one layer: the one before or after a pruning step.

    `visual_k` are the keys of all visual tokens so far, those of this call last, for the heads kept
    in that layer.
    """

    layer: int
    text: StreamQKV
    visual_k: Tensor | None
    weights: VisualWeights
    masks: AttentionMasks

    def products(self, rows: TokenRows) -> Tensor:
        """Return scaled q · k of given text rows with visual and text keys, [B, h, R, K]."""
        heads = self.weights.heads
        q_BhTd = select_heads(cast(Tensor, self.text.q), heads.kept).float()
        index = rows.index_BR[:, None, :, None].expand(-1, q_BhTd.shape[1], -1, q_BhTd.shape[3])
        visual_k = select_heads(cast(Tensor, self.visual_k), heads.reads)
        k = torch.cat([visual_k, kv_heads_for(self.text.k, heads.kept, heads.per_group)], dim=2)
        return q_BhTd.gather(2, index) @ k.float().transpose(2, 3) * self.weights.view.scaling

    def attention_of_token(self) -> Tensor:
        """Return the attention of the call's only token to all visual tokens so far, [B, N].

        The softmax is over all visual and text keys, in float32, and averaged over the heads that
        attend to visual tokens.
        """
        first = torch.zeros(len(self.text.k), 1, dtype=torch.int64, device=self.text.k.device)
        products_Bh1K = self.products(TokenRows(first, None))
        if self.masks.mixed_BTK is not None:
            products_Bh1K = products_Bh1K.masked_fill(~self.masks.mixed_BTK, -torch.inf)
        seen = cast(Tensor, self.visual_k).shape[2]
        return products_Bh1K.softmax(dim=-1).mean(dim=1)[:, 0, :seen]


@dataclass(frozen=True)
class LayersAhead:
    """What a pruning step may use of the layers after it.

    `qk` returns the queries and keys that the unpruned rows would have in the next layer.
    `attention_norm` is the input norm of that layer, `final_norm` the last norm of the decoder.
    """

    qk: Callable[[], LayerQK]
    attention_norm: Callable[[Tensor], Tensor]
    final_norm: Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class InputEmbeddings:
    """Input embeddings of both streams, [B, T, D] and [B, N, D], and the real visual rows."""

    text_BTD: Tensor
    visual_BND: Tensor
    visual_valid_BN: Tensor


@dataclass(frozen=True)
class SelectionInputs:
    """Inputs of a pruning step: one call at one point of the decoder.

    `states_IMD` are the hidden states of the visual tokens, which before the decoder are their
    embeddings, `cells` their cells in their frames [I, M], and `initial_counts` the number of
    tokens that each frame had before any pruning. `text_BTD` are the states of the text rows,
    `text` their positions. `input_embeddings` are both streams as they entered the decoder, with
    all visual rows. `last_qk` is None before the first layer. `tower_output` holds the vision
    tower's outputs by frame (V is [I, M]) and is None unless the tower is recorded. `separator_BS`
    [B, S] marks text that belongs to an image.
    """

    name: str
    frames: Frames
    cells: Cells
    states_IMD: Tensor
    initial_counts: tuple[int, ...]
    visual: TokenRows
    text: TokenRows
    text_BTD: Tensor
    input_embeddings: InputEmbeddings
    last_qk: LayerQK | None
    ahead: LayersAhead
    tower_output: TowerOutput | None
    separator_BS: Tensor | None = None

    @property
    def valid(self) -> Tensor:
        """Real tokens of each frame, bool [I, M]."""
        return self.frames.valid_IM

    def question_rows(self) -> Tensor:
        """Mark the text rows after the last image of their sample, bool [B, T]."""
        return rows_after_images(self.text, self.visual, self.separator_BS)

    def require_question_rows(self) -> Tensor:
        """Return `question_rows`; raise if a sample with an image has no text after it.

        Raises:
            UserError: an image ends its prompt.
        """
        question_BT = self.question_rows()
        if not bool(question_BT.any(dim=1)[self.frames.sample_I].all()):
            raise UserError(
                f"{self.name} chooses an image's tokens by the text after them, but a prompt of "
                "this call ends with its image: put the question after the image"
            )
        return question_BT

    def last_row(self) -> TokenRows:
        """Return the row of every sample's last token: a text row or a readout row."""
        # Rows are aligned at the right, so the last one has the same index in every sample. It is
        # after all images, because a prompt that ends with an image has a readout row.
        places_B1 = torch.full_like(self.text.index_BR[:, :1], self.text.count - 1)
        return TokenRows(places_B1, None)

    def attention(self, rows: TokenRows, *, upcoming: bool = False) -> Tensor:
        """Return the attention of the given text rows to each visual token, [I, R, M].

        It is the attention in the preceding layer or, with `upcoming`, that in the next layer if
        nothing were removed. The softmax is over all visual and text keys that a row attends to, in
        float32, and averaged over the heads that attend to visual tokens. `rows` are positions
        among the text rows.
        """
        qk = self._attended(self.ahead.qk() if upcoming else self.last_qk)
        scores_BhRK = qk.products(rows)
        # Recomputed for R rows, because the fused kernel returns no weights. The mask exists even
        # if the layer ran in plain causal order without it.
        mask = cast(Tensor, qk.masks.mixed_BTK).expand(len(rows.index_BR), -1, -1, -1)
        if self.text.readout_BR is not None:
            mask = self._readouts_as_visual(mask, cast(Tensor, qk.visual_k).shape[2])
        index = rows.index_BR[:, None, :, None].expand(-1, -1, -1, mask.shape[-1])
        weight = scores_BhRK.masked_fill(~mask.gather(2, index), -torch.inf).softmax(dim=-1)
        return self._own(weight, qk).transpose(1, 2)

    def products(self, rows: TokenRows) -> Tensor:
        """Return the scaled q · k of given text rows with visual keys, [I, R, M]."""
        last_qk = self._attended(self.last_qk)
        return self._own(last_qk.products(rows), last_qk).transpose(1, 2)

    def keys(self, *, upcoming: bool = False) -> tuple[Tensor, Tensor]:
        """Return the keys of visual tokens [I, M, V · d] and of text rows [B, T, V · d].

        They are those of the key-value heads kept for visual tokens, after rotation, in the
        preceding layer or, with `upcoming`, in the next layer if nothing were removed.
        """
        qk = self._attended(self.ahead.qk() if upcoming else self.last_qk)
        groups = qk.weights.heads.groups
        # Keys start with those of earlier calls; only the tokens of this call can be pruned.
        visual = cast(Tensor, qk.visual_k)[:, :, -self.visual.count :]
        text = select_heads(qk.text.k, groups)[:, :, -self.text.count :]
        return (
            self.frames.pack(visual.transpose(1, 2).flatten(2)),
            text.transpose(1, 2).flatten(2),
        )

    def require_tower_output(self) -> TowerOutput:
        """Return the vision tower's outputs.

        Raises:
            UserError: the call's images were encoded before the tower was recorded.
        """
        if self.tower_output is None:
            raise UserError(
                f"{self.name} reads the vision tower, but the images of this call were encoded "
                "outside it: call the model with their pixels"
            )
        return self.tower_output

    def _attended(self, layer: LayerQK | None) -> LayerQK:
        """Require that the layer was recorded and that some head attends to visual tokens."""
        qk = cast(LayerQK, layer)
        if qk.visual_k is None:
            raise UserError(
                f"{self.name} reads the attention of layer {qk.layer}, in which no head "
                "attends to visual tokens: keep some heads there or set a different `after`"
            )
        return qk

    def _readouts_as_visual(self, mask_BTK: Tensor, seen: int) -> Tensor:
        """Let each readout row attend to the visual token that it repeats instead of to itself.

        The attention of that token to itself then counts as attention to a visual token. Keys are
        `seen` visual ones, those of this call last, and then text ones in the same order.
        """
        text, visual = self.text, self.visual
        same_BTN = text.index_BR[:, :, None] == visual.index_BR[:, None, :]
        same_BTN &= cast(Tensor, text.readout_BR)[:, :, None] & visual.validity[:, None, :]
        # If an earlier step has removed the token, the row still attends to itself.
        alone_BTT = torch.diag_embed(same_BTN.any(dim=2))
        mask_BTK = mask_BTK.clone()
        mask_BTK[:, 0, :, seen - visual.count : seen] |= same_BTN
        mask_BTK[:, 0, :, mask_BTK.shape[-1] - text.count :] &= ~alone_BTT
        return mask_BTK

    def _own(self, x_BhRK: Tensor, qk: LayerQK) -> Tensor:
        """Return the mean over heads for the visual tokens of this call, [I, M, R]."""
        seen = cast(Tensor, qk.visual_k).shape[2]
        mean_BRN = x_BhRK[..., seen - self.visual.count : seen].mean(dim=1)
        return self.frames.pack(mean_BRN.transpose(1, 2))
