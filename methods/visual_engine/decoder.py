"""The visual engine: a vision-language model run with less work for its visual tokens.

Shapes: B samples, S tokens of a call, T text rows, N visual rows, D d_model, V vocabulary.

The engine replaces the text decoder's forward, so the model's own `generate` works unchanged. Calls
without images, either in the call or in its cache, are passed to the original decoder. All other
calls run in `_run`. Pruning steps divide the decoder into stages; between stages, visual tokens are
removed permanently.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache as cache_result
from functools import partial
from typing import TypedDict, Unpack, cast

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache
from transformers.modeling_outputs import MoeModelOutputWithPast

from bench.data.chat import ModelInputs
from bench.errors import UserError
from bench.models.network import TransformersNetwork, replace_forward
from bench.models.structure.model_structure import ModelStructure, inspect_model
from bench.models.vlm.decoder_view import DecoderLayer, open_decoder
from bench.models.vlm.tower_pass import RankPatches
from bench.models.vlm.vision_tower import LayerRequest, Tower, TowerOutput
from bench.models.vlm.visual_tokens import BIDIRECTIONAL, VisualTokens, locate_visual_tokens
from methods.visual_engine.attention import angles_of_kinds
from methods.visual_engine.forward_state import (
    CallPositions,
    ForwardState,
    ImageInputs,
    VisualTokensState,
    all_visual_tokens,
    match_tower_output,
    take_angles,
)
from methods.visual_engine.kv_cache import is_split_cache, split_cache
from methods.visual_engine.layer import CallContext, Streams, two_stream_layer, upcoming_qk
from methods.visual_engine.masked_mode import MaskedMode
from methods.visual_engine.plan import VisualPlan
from methods.visual_engine.selection_inputs import InputEmbeddings, LayerQK, LayersAhead
from methods.visual_engine.selection_step import SelectionOverhead, TokenPruningStep
from methods.visual_engine.token_index import (
    Cells,
    Frames,
    TokenRows,
    last_positions,
    rows_where,
    text_rows_where,
)
from methods.visual_engine.weight_cache import WeightCache

ENGINE_ATTRIBUTE = "slimbench_visual_engine"

# Returns the vision tower's outputs of a call; None if the tower is not recorded.
ReadTower = Callable[[], TowerOutput | None]


class DecoderCall(TypedDict, total=False):
    """Arguments of a text decoder's forward that the engine reads."""

    inputs_embeds: Tensor
    attention_mask: Tensor | None
    position_ids: Tensor | None
    past_key_values: DynamicCache | None
    use_cache: bool | None
    deepstack_visual_embeds: list[Tensor] | None


class VisualEngine:
    """Runs one network under its `VisualPlan`; creating the engine installs it in the network."""

    def __init__(self, network: nn.Module, structure: ModelStructure) -> None:
        self.network = network
        self.decoder = open_decoder(network, structure)
        self.plan = VisualPlan.dense(len(self.decoder.layers))
        self.weight_cache = WeightCache(self.decoder, self.plan)
        self.masked_mode = MaskedMode(network, self.decoder, self.plan)
        self.overhead = SelectionOverhead()
        self.tower: Tower | None = None
        self._left: list[Cells] = []
        self._tokens: VisualTokens | None = None
        self._padding_mask: Tensor | None = None
        self._bypassed = False
        self._original_forward: Callable[..., object] = self.decoder.module.forward
        # Never undone: a copy of the network contains a copy of the engine.
        replace_forward(self.decoder.module, self.forward)
        self.decoder.inner.register_forward_pre_hook(self._locate_tokens, with_kwargs=True)
        setattr(network, ENGINE_ATTRIBUTE, self)

    @contextmanager
    def dense(self) -> Iterator[None]:
        """Run the network without its plan inside the `with` block."""
        before = self._bypassed
        self._bypass(True)
        try:
            yield
        finally:
            self._bypass(before)

    def _bypass(self, bypassed: bool) -> None:
        self._bypassed = bypassed
        if self.tower is not None and self.tower.pruning is not None:
            self.tower.pruning.enabled = not bypassed

    def last_logits(self, call: ModelInputs) -> Tensor:
        """Return the logits of every sample's last token, [B, V], without a cache."""
        logits_B1V: Tensor = self.network(**call, use_cache=False, logits_to_keep=1).logits
        return logits_B1V[:, -1]

    def tokens_left(self) -> list[tuple[int, ...]]:
        """Return the tokens per frame after each pruning step of the last call with images."""
        # Counted on demand, because counting on a GPU waits for the device.
        return [Frames.of(cells).counts for cells in self._left]

    def record_tower(self, *layers: LayerRequest) -> None:
        """Record the vision tower's outputs and the requested layers, for steps that read them.

        Raises:
            UserError: the tower is not supported, or does not have these layers.
        """
        if self.tower is None:
            self.tower = Tower(self.network)
        self.tower.request(*layers)

    def prune_tower(self, name: str, rank: RankPatches) -> None:
        """Remove patches inside the vision tower; a pruning step must remove their tokens.

        Raises:
            UserError: the tower does not support it.
        """
        self.record_tower()
        cast(Tower, self.tower).prune(name, rank)

    @property
    def tower_rows(self) -> tuple[int, ...] | None:
        """Rows of an image in each layer of the tower's last pass; None if it removes none."""
        pruning = None if self.tower is None else self.tower.pruning
        return None if pruning is None else tuple(pruning.rows)

    def _locate_tokens(
        self, inner: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]
    ) -> None:
        """Locate the visual tokens of a call before it reaches the decoder."""
        # Only the inner model gets token ids and pixels; its decoder gets embeddings. The result is
        # stored until the decoder's forward takes it.
        call = inspect.signature(inner.forward).bind_partial(*args, **kwargs).arguments
        call |= call.pop("kwargs", {})
        self._tokens = locate_visual_tokens(self.network, call)
        # Gemma's inner models convert it to other masks before they call the decoder.
        self._padding_mask = call.get("attention_mask")

    def forward(self, *args: object, **call: Unpack[DecoderCall]) -> object:
        """Run one call: with the original decoder, in masked mode, or on two streams."""
        # Taken before the tests below, together with the tower's recordings: a call that returns
        # early must not leave them for the next call, which has other images.
        tokens, self._tokens = self._tokens, None
        padding, self._padding_mask = self._padding_mask, None
        read_tower = self._tower_reader(tokens)
        cache = call.get("past_key_values")
        if self._bypassed or self.plan.execution is None:
            return self._original_forward(*args, **call)
        # Masked mode also gets text-only calls: it stores its marks on the cache, not in a split
        # cache.
        if self.plan.execution == "masked":
            return self.masked_mode.run(self._original_forward, tokens, *args, **call)
        # A text-only call with images in its cache must run here, because only the engine can read
        # the visual part.
        if tokens is None and not is_split_cache(cache):
            return self._original_forward(*args, **call)
        if cast(TransformersNetwork, self.network).config.model_type in BIDIRECTIONAL:
            call["attention_mask"] = padding
        return self._run(tokens, read_tower, **call)

    def _tower_reader(self, tokens: VisualTokens | None) -> ReadTower:
        """Return a lazy reader for vision-tower outputs of this call."""
        tower = self.tower
        runs = [] if tower is None else tower.take_calls()

        # Reading recomputes attention in the tower, so it is done on demand and at most once.
        @cache_result
        def read() -> TowerOutput | None:
            if tower is None or tokens is None or not runs:
                return None
            return match_tower_output(tower.read(runs), tokens)

        return read

    def _run(
        self,
        tokens: VisualTokens | None,
        read_tower: ReadTower,
        inputs_embeds: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: DynamicCache | None = None,
        use_cache: bool | None = None,
        deepstack_visual_embeds: list[Tensor] | None = None,
        **_: object,
    ) -> MoeModelOutputWithPast:
        """Split the call into two streams, run them through all layers, and return text rows.

        Visual rows of the returned hidden states are NaN, or 0 if gradients are enabled.
        """
        text, visual = split_rows(inputs_embeds, tokens, attention_mask)
        cache, offset = self._prepare_cache(
            past_key_values, use_cache, inputs_embeds, attention_mask
        )
        positions = self._positions(inputs_embeds, position_ids, offset)
        angles = positions.angles()
        streams = Streams(text.take(inputs_embeds), None)
        images: ImageInputs | None = None
        visual_state: VisualTokensState | None = None
        readout_stacked: list[Tensor] = []
        if tokens is not None and visual is not None:
            streams.visual_BND = visual.take(inputs_embeds)
            embeddings = InputEmbeddings(streams.text_BTD, streams.visual_BND, visual.validity)
            images = ImageInputs(tokens, embeddings)
            stacked = _deepstack_rows(deepstack_visual_embeds, inputs_embeds, tokens, visual)
            visual_state = all_visual_tokens(tokens, visual, take_angles(visual, angles), stacked)
            if text.readout_BR is not None:
                readout_stacked = _deepstack_rows(
                    deepstack_visual_embeds, inputs_embeds, tokens, text
                )
        rotary, window = take_angles(text, angles), self.plan.window
        state = ForwardState(text, rotary, positions, images, visual_state, window, cache, offset)
        x_BTD = self._through_layers(streams, state, read_tower, readout_stacked)
        if images is not None:
            self._left = [stage.cells for stage in state.stages[1:]]
        state.commit_to_cache(inputs_embeds.shape[1])
        # Visual rows are not computed to the end. NaN makes this visible in their logits, while
        # zeros would look like an answer (token 0). In training the loss skips these rows, but NaN
        # times a gradient of 0 is NaN.
        unknown = 0.0 if torch.is_grad_enabled() else torch.nan
        out_BSD = text.put(torch.full_like(inputs_embeds, unknown), self._final_norm(x_BTD))
        return MoeModelOutputWithPast(last_hidden_state=out_BSD, past_key_values=cache)

    def _prepare_cache(
        self,
        cache: DynamicCache | None,
        use_cache: bool | None,
        x_BSD: Tensor,
        mask: Tensor | None,
    ) -> tuple[DynamicCache | None, int]:
        """Return the cache of a call, split into streams, and the number of tokens before the call.

        Like transformers, create a cache if the call or else the config asks for one.
        """
        config = self.decoder.config
        if cache is None and (config.use_cache if use_cache is None else use_cache):
            cache = DynamicCache(config=config)
        offset = 0 if cache is None else cache.get_seq_length()
        self._require_reach(offset + x_BSD.shape[1])
        if cache is not None:
            past_mask = None if mask is None else mask[:, :offset]
            self._split_once(cache, past_mask, len(x_BSD), x_BSD.device)
        return cache, offset

    def _split_once(
        self, cache: DynamicCache, past_mask: Tensor | None, batch: int, device: torch.device
    ) -> None:
        """Split a cache unless an earlier call has; require the same number of pruning steps."""
        stages = len(self.plan.steps) + 1
        if not is_split_cache(cache):
            split_cache(cache, len(self.decoder.layers), stages, batch, past_mask, device)
        cached_stages = len(cache.layers[0].cached_tokens.visual)
        if cached_stages != stages:
            raise UserError(
                f"the cache has {cached_stages - 1} pruning steps, but the plan has {stages - 1}: "
                "start a new cache after adding a pruning method"
            )

    def _through_layers(
        self,
        streams: Streams,
        state: ForwardState,
        read_tower: ReadTower,
        readout_stacked: list[Tensor],
    ) -> Tensor:
        """Return the text rows after the last layer; visual rows end at the cut.

        `readout_stacked` [B, T, D] is what DeepStack adds to readout rows, zero elsewhere.
        """
        cut, steps, stage = self.plan.cut, self.plan.steps, 0
        decode = self.plan.decode if state.generates else None
        for layer in self.decoder.layers:
            # `stage` counts the steps passed, even in calls without visual rows, because it selects
            # the cached positions that the layer attends to.
            for step in steps[stage:] if layer.index < cut else ():
                if step.after > layer.index:
                    break
                streams = self._prune(step, streams, state, layer, read_tower)
                stage += 1
            if decode and decode.layer == layer.index and streams.last_qk is not None:
                with self.overhead.timed(streams.text_BTD.device):
                    state.select_cached(decode, streams.last_qk)
            call = self._of_kind(layer, state.call(steps[:stage]))
            if layer.index < cut:
                streams = two_stream_layer(
                    streams,
                    layer,
                    self.weight_cache.layer(layer.index),
                    call,
                    last=layer.index == cut - 1,
                    keep_qk=self.plan.records_qk(layer.index, generated=state.generates),
                )
            elif streams.text_BTD.shape[1]:
                streams.text_BTD = layer.module(
                    streams.text_BTD,
                    attention_mask=call.masks.text_BTK,
                    position_embeddings=call.text_rotary,
                    past_key_values=call.cache,
                    use_cache=call.cache is not None,
                )
            # DeepStack (Qwen3-VL) adds tower features to visual tokens after each of the first
            # layers. Pruning steps remove them together with the rows.
            if layer.index < len(readout_stacked):
                streams.text_BTD = streams.text_BTD + readout_stacked[layer.index]
            stacked = [] if state.visual is None else state.visual.stacked
            if streams.visual_BND is not None and layer.index < len(stacked):
                streams.visual_BND = streams.visual_BND + stacked[layer.index]
        return streams.text_BTD

    def _prune(
        self,
        step: TokenPruningStep,
        streams: Streams,
        state: ForwardState,
        layer: DecoderLayer,
        read_tower: ReadTower,
    ) -> Streams:
        """Run a pruning step before a layer; without visual rows there is nothing to prune."""
        if state.visual is None:
            return streams
        reached = self.plan.reaching(layer.index)
        ahead = LayersAhead(
            cache_result(partial(self._next_qk, streams, state, layer, reached)),
            layer.attention_norm,
            self._final_norm,
        )
        with self.overhead.timed(streams.text_BTD.device):
            return state.run_step(step, streams, read_tower, ahead)

    def _next_qk(
        self,
        streams: Streams,
        state: ForwardState,
        layer: DecoderLayer,
        reached: Sequence[TokenPruningStep],
    ) -> LayerQK:
        """Return the queries and keys of the layer after some steps, for the rows before them."""
        weights, call = self.weight_cache.layer(layer.index), state.upcoming(reached)
        return upcoming_qk(streams, layer, weights, self._of_kind(layer, call))

    def _of_kind(self, layer: DecoderLayer, call: CallContext) -> CallContext:
        """Return the inputs that all layers of this layer's kind share."""
        if layer.kind is None:
            return call
        return call.of_kind(self.decoder.kinds.index(layer.kind), len(self.decoder.kinds))

    def _require_reach(self, length: int) -> None:
        """Raise if a sequence is longer than the sliding window of some layer."""
        reach = self.decoder.reach
        if reach is not None and length > reach:
            raise UserError(
                f"a sequence has {length} tokens, but some layers of "
                f"{self.decoder.config.model_type} attend to the last {reach} only, and "
                "visual-token methods do not support such windows: use fewer images or crops, "
                "shorter prompts, or method=dense"
            )

    def _final_norm(self, x: Tensor) -> Tensor:
        return cast(Callable[[Tensor], Tensor], self.decoder.module.norm)(x)

    def _positions(self, x_BSD: Tensor, positions: Tensor | None, offset: int) -> CallPositions:
        """Return the positions of a call's tokens.

        `positions` are [B, S], [3, B, S] (M-RoPE), or [4, B, S], of which the first row is only for
        packed text and ignored.
        """
        rotary = cast(nn.Module, self.decoder.module.rotary_emb)
        if positions is None:
            positions = torch.arange(offset, offset + x_BSD.shape[1], device=x_BSD.device)[None]
        if positions.ndim == 3 and positions.shape[0] == 4:
            positions = positions[1:]
        if positions.ndim == 2 and hasattr(rotary, "mrope_section"):
            positions = positions[None].expand(3, -1, -1)
        kinds = self.decoder.kinds
        rotate = partial(angles_of_kinds, rotary, x_BSD, kinds) if kinds else partial(rotary, x_BSD)
        return CallPositions(positions, rotate)


def visual_engine_of(network: nn.Module) -> VisualEngine:
    """Return the network's engine, which the first call creates."""
    known = getattr(network, ENGINE_ATTRIBUTE, None)
    if isinstance(known, VisualEngine):
        return known
    return VisualEngine(network, inspect_model(network))


def split_rows(
    x_BSD: Tensor, tokens: VisualTokens | None, mask: Tensor | None
) -> tuple[TokenRows, TokenRows | None]:
    """Separate text rows and visual rows; padding belongs to neither.

    A visual token that ends its prompt is in both: among text rows as a readout row.

    Raises:
        UserError: the attention mask is not a padding mask of two dimensions.
    """
    if mask is not None and getattr(mask, "ndim", None) != 2:
        raise UserError("visual token strategies need a padding mask of two dimensions")
    batch, length = x_BSD.shape[:2]
    # A generated token is a real text row in every sample. Reading the mask would synchronise with
    # the GPU at every token.
    if length == 1 and tokens is None:
        return TokenRows(torch.zeros(batch, 1, dtype=torch.int64, device=x_BSD.device), None), None
    every = torch.ones(batch, length, dtype=torch.bool, device=x_BSD.device)
    real_BS = every if mask is None else mask[:, -length:].bool()
    if tokens is None:
        return rows_where(real_BS), None
    readout_BS = last_positions(real_BS) & tokens.mask
    return text_rows_where(real_BS & ~tokens.mask, readout_BS), rows_where(tokens.mask)


def _deepstack_rows(
    embeds: list[Tensor] | None, x_BSD: Tensor, tokens: VisualTokens, rows: TokenRows
) -> list[Tensor]:
    """Return what DeepStack adds to some rows after each of the first layers, [B, R, D] each."""
    if not embeds:
        return []
    # The embeddings are flat over the batch, in the order of visual tokens. Scattering them into
    # zeros restores their positions in the sequence, from which rows can be taken.
    empty_BSD, mask_BS1 = torch.zeros_like(x_BSD), tokens.mask[..., None]
    return [rows.take(empty_BSD.masked_scatter(mask_BS1, e.to(x_BSD.dtype))) for e in embeds]
