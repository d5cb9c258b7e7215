"""Scores of heads, neurons and layer cuts, measured on a few prompts in one dense pass each.

The score of a head is its attention mass on visual tokens divided by that on text tokens. A neuron
with a = act(Wgate x) ⊙ Wup x, times the router's weight in an expert, adds a_j · Wdown[:, j] to a
row; its score is E|a_j| · ‖Wdown[:, j]‖ over visual rows. The score of a cut is the KL divergence
of the answer from the dense one.

Shapes: B samples, S tokens, T text rows, N visual rows, R query rows, H query heads, G key-value
heads, L layers, D d_model, F a feed-forward's width, d a head's width, C layer cuts, V vocabulary,
Y tokens of one expert.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from bench.data.chat import ModelInputs
from bench.data.prompts import ProcessedPrompts
from bench.errors import MissingData, UserError
from bench.models.expert_hooks import observe_experts
from bench.models.structure.moe_block import MoEBlock
from bench.models.vlm.decoder_view import DecoderLayer, decoder_layers
from bench.models.vlm.visual_tokens import VisualTokens, locate_visual_tokens
from bench.ui import Progress
from methods.visual_engine.attention import Rotary
from methods.visual_engine.cost.closed_form import PromptLengths
from methods.visual_engine.decoder import VisualEngine
from methods.visual_engine.masked_mode import set_attention, use_attention
from methods.visual_engine.masks import attention_masks
from methods.visual_engine.token_index import TokenRows, rows_where
from methods.visual_tokens.calibration_stats import FACTS_FILE, TENSORS_FILE, CalibrationStats

if TYPE_CHECKING:
    from bench.method import Context, InputSize, MethodWork
    from bench.models.structure.model_structure import ModelStructure

RECORDING_ATTENTION = "slimbench_visual_recording"

# Statistics by engine and fingerprint of the prompts, because all strategies of a run share one
# calibration of the dense network. The weak keys free them with their network.
_measured: WeakKeyDictionary[VisualEngine, dict[str, CalibrationStats]] = WeakKeyDictionary()


@torch.no_grad()
def calibrate(
    engine: VisualEngine, samples: ProcessedPrompts, progress: Progress
) -> CalibrationStats:
    """Score every head, neuron and layer cut of the dense network on the given prompts.

    Raises:
        UserError: a prompt has no image.
    """
    neurons = NeuronScores(engine.decoder.layers)
    last, text, kls, lengths = [], [], [], []
    for call in progress.track(samples.inputs, "calibrating on images"):
        tokens = require_visual_tokens(engine, call)
        recorder = AttentionRecorder(engine, tokens, call)
        with engine.dense(), recorder.recording(), neurons.recording(tokens.mask):
            logits_BV = engine.last_logits(call)
        last.append(recorder.ratios("last"))
        text.append(recorder.ratios("text"))
        kls.append(recorder.cut_divergence(logits_BV))
        lengths.append(_prompt_lengths(tokens, recorder.text))
    return CalibrationStats(
        last=_by_loaded_number(torch.cat(last), engine),
        text=_by_loaded_number(torch.cat(text), engine),
        neurons=[
            [engine.weight_cache.by_loaded_number(i, n, score_F) for n, score_F in enumerate(units)]
            for i, units in enumerate(neurons.scores())
        ],
        cut_kl=[*torch.stack(kls).mean(dim=0).tolist(), 0.0],
        prompt=_mean_prompt(lengths),
        samples=samples.fingerprint,
    )


def require_visual_tokens(engine: VisualEngine, call: ModelInputs) -> VisualTokens:
    """Return the positions of a calibration prompt's visual tokens.

    Raises:
        UserError: the prompt has no image.
    """
    tokens = locate_visual_tokens(engine.network, call)
    if tokens is None:
        raise UserError("a calibration prompt has no image: prompts= must give an image in each")
    return tokens


class AttentionRecorder:
    """Recorder of one dense pass: attention sums, and text rows at the input of every layer."""

    def __init__(self, engine: VisualEngine, tokens: VisualTokens, call: ModelInputs) -> None:
        self.engine, self.tokens = engine, tokens
        mask = call.get("attention_mask")
        self.real_BS = torch.ones_like(tokens.mask) if mask is None else mask.bool()
        self.text: TokenRows = rows_where(self.real_BS & ~tokens.mask)
        self._sums: dict[str, list[Tensor]] = {"last": [], "text": []}
        self._states: list[Tensor] = []
        self._rotary: list[Rotary] = []

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Record the network's next forward."""
        network = self.engine.network
        with ExitStack() as stack:
            former = use_attention(network, RECORDING_ATTENTION, self._attention)
            stack.callback(set_attention, network, former)
            for layer in self.engine.decoder.layers:
                hook = layer.module.register_forward_pre_hook(self._enter_layer, with_kwargs=True)
                stack.callback(hook.remove)
            yield

    def ratios(self, queries: str) -> Tensor:
        """Return visual over text attention mass of every head, [B, L, H]."""
        return torch.stack(self._sums[queries], dim=1).cpu()

    def cut_divergence(self, dense_BV: Tensor) -> Tensor:
        """Return the KL divergence from the dense answer for cuts 1 to L - 1, [L - 1] nats.

        Layers before a cut are the same as in the dense pass, so only text rows after it are
        computed. Each layer processes the rows of all earlier cuts in one batch.
        """
        decoder = self.engine.decoder
        layers, attention = decoder.layers, self.tokens.attention
        masks = attention_masks(self.text, None, None, None, None, 0, attention=attention)
        streams = self._states[0][:0]
        for layer in layers[1:]:
            # The batch grows by one cut per layer: entry c are the text rows whose visual tokens
            # were removed before layer c. All cuts take L (L - 1) / 2 layer passes over text rows,
            # while one pass per cut would repeat the visual rows each time.
            streams = torch.cat([streams, self._states[layer.index]])
            repeats = len(streams) // len(dense_BV)
            angles = tuple(
                part.expand(len(dense_BV), -1, -1).repeat(repeats, 1, 1)
                for part in self._rotary[layer.index]
            )
            mask = None if masks.text_BTK is None else masks.text_BTK.repeat(repeats, 1, 1, 1)
            streams = layer.module(streams, attention_mask=mask, position_embeddings=angles)
        norm = cast(nn.Module, decoder.module.norm)
        head = cast(PreTrainedModel, self.engine.network).get_output_embeddings()
        cut_CBV = head(norm(streams[:, -1])).unflatten(0, (len(layers) - 1, len(dense_BV)))
        dense_BV = dense_BV.double().log_softmax(-1)
        distance: Tensor = dense_BV.exp() * (dense_BV - cut_CBV.double().log_softmax(-1))
        return distance.sum(dim=-1).mean(dim=1)

    def _enter_layer(self, _: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Any]) -> None:
        hidden_BSD = args[0] if args else kwargs["hidden_states"]
        self._states.append(self.text.take(hidden_BSD))
        cos, sin = kwargs["position_embeddings"]
        self._rotary.append((self.text.take(cos), self.text.take(sin)))

    def _attention(
        self,
        module: nn.Module,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        scaling: float,
        **rest: object,
    ) -> tuple[Tensor, None]:
        """Attend with SDPA, and record the attention mass on visual and on text keys."""
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        every = self.text.index_BR
        for name, rows_BR in (("last", every[:, -1:]), ("text", every)):
            self._sums[name].append(self._ratio(q, k, rows_BR, scaling))
        attended: tuple[Tensor, None] = sdpa_attention_forward(
            module, q, k, v, mask, scaling=scaling, **rest
        )
        return attended

    def _ratio(self, q_BHSd: Tensor, k_BGSd: Tensor, rows_BR: Tensor, scaling: float) -> Tensor:
        """Return visual over text attention mass of some query rows, [B, H].

        Only the softmax of these rows, [R, S], is materialised, not the S x S matrix.
        """
        k_BHSd = k_BGSd.repeat_interleave(q_BHSd.shape[1] // k_BGSd.shape[1], dim=1)
        index_BHRd = rows_BR[:, None, :, None].expand(-1, q_BHSd.shape[1], -1, q_BHSd.shape[3])
        scores = q_BHSd.gather(2, index_BHRd).float() @ k_BHSd.float().transpose(2, 3) * scaling
        places_S = torch.arange(k_BHSd.shape[2], device=rows_BR.device)
        seen_BRS = places_S <= rows_BR[..., None]
        if self.tokens.attention == "prompt":
            seen_BRS = torch.ones_like(seen_BRS)
        seen_BRS &= self.real_BS[:, None]
        weight = scores.masked_fill(~seen_BRS[:, None], -torch.inf).softmax(dim=-1)
        # The rows are the last R text rows, so their validity is the end of that of all text rows.
        real_BR = self.text.validity[:, -rows_BR.shape[1] :]
        mass_BHS = torch.where(real_BR[:, None, :, None], weight, 0).sum(dim=2)
        visual_BH = (mass_BHS * self.tokens.mask[:, None]).sum(dim=-1)
        return visual_BH / (mass_BHS.sum(dim=-1) - visual_BH)


def _by_loaded_number(ratio_ILH: Tensor, engine: VisualEngine) -> Tensor:
    """Order scores of heads by their numbers in the loaded network."""
    order_LH = torch.tensor(engine.weight_cache.head_order()).expand_as(ratio_ILH)
    return torch.zeros_like(ratio_ILH).scatter(2, order_LH, ratio_ILH)


def _prompt_lengths(tokens: VisualTokens, text: TokenRows) -> Tensor:
    """Return mean numbers of visual tokens, text tokens before the last of them, and text, [3]."""
    places_S = torch.arange(tokens.mask.shape[1], device=text.index_BR.device)
    last_B1 = (tokens.mask * places_S).amax(dim=1, keepdim=True)
    before_BR = text.validity & (text.index_BR < last_B1)
    counts = (tokens.mask.sum(1), before_BR.sum(1), text.validity.sum(1))
    return torch.stack([count.double().mean() for count in counts])


def _mean_prompt(lengths: list[Tensor]) -> PromptLengths:
    visual, before, text = (round(x) for x in torch.stack(lengths).mean(dim=0).tolist())
    return PromptLengths(visual, before, text, float(visual))


def with_calibration(work: MethodWork, structure: ModelStructure, inputs: InputSize) -> MethodWork:
    """Add what `calibrate` costs to a method's work.

    A dense pass; for cuts, L (L - 1) / 2 layers on text rows (`AttentionRecorder.cut_divergence`);
    the attention of text rows to all keys once more, in float32; and |a| of visual rows.
    """
    layers = decoder_layers(structure)
    text = inputs.length - inputs.visual
    views = [layer.attention_view() for layer in layers]
    pairs = sum(view.heads * inputs.rows * text * inputs.length for view in views)
    neurons = sum(unit.width for layer in layers for unit in layer.units())
    return replace(
        work,
        forwards=work.forwards + 1 + (len(layers) - 1) / 2 * text / max(1.0, inputs.length),
        flops=work.flops + 2 * pairs * views[0].head_dim,
        elements=work.elements + 6 * pairs + 3 * inputs.rows * inputs.visual * neurons,
    )


class NeuronScores:
    """Sums of |a_j| over the visual tokens of all calls, for every feed-forward of every layer."""

    def __init__(self, layers: Sequence[DecoderLayer]) -> None:
        self.layers = layers
        self._sums = [[torch.zeros(unit.width) for unit in layer.units()] for layer in layers]
        self._tokens = 0

    @contextmanager
    def recording(self, visual_BS: Tensor) -> Iterator[None]:
        """Record the network's next forward; `visual` marks the visual tokens of the call."""
        with ExitStack() as stack:
            for layer in self.layers:
                sums = self._sums[layer.index]
                moe = layer.moe
                if moe is None:
                    down = cast(nn.Linear, layer.feed_forward.down_proj)
                    handle = down.register_forward_pre_hook(_dense_hook(sums[0], visual_BS))
                else:
                    hook = _expert_hook(moe, sums, visual_BS)
                    handle = moe.block.register_forward_hook(hook)
                stack.callback(handle.remove)
            yield
        self._tokens += int(visual_BS.sum())

    def scores(self) -> list[list[Tensor]]:
        """Return E|a_j| · ‖Wdown[:, j]‖ of every neuron, [F] for each feed-forward."""
        return [
            [
                # For experts, too, the mean is over all visual tokens, not only those routed to
                # them, because a rarely used expert contributes less.
                total_F / max(1, self._tokens) * unit.down.detach().float().norm(dim=0).cpu()
                for total_F, unit in zip(sums, layer.units(), strict=True)
            ]
            for sums, layer in zip(self._sums, self.layers, strict=True)
        ]


def _dense_hook(sum_F: Tensor, visual_BS: Tensor) -> Callable[..., None]:
    """Return a hook on a down projection that accumulates its input on visual rows."""

    def before(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        sum_F.add_(args[0][visual_BS].abs().float().sum(dim=0).cpu())

    return before


class _ExpertAccumulator:
    """Accumulates the expert activations of one block, times the router's weight."""

    def __init__(self, sums: list[Tensor], routed: int) -> None:
        self.sums, self.number = sums, routed

    def routed(self, expert: int, x_YD: Tensor, hidden_YF: Tensor, weight_Y: Tensor) -> None:
        self.sums[expert].add_((hidden_YF * weight_Y[:, None]).abs().float().sum(dim=0).cpu())

    def shared(self, x_YD: Tensor, hidden_YF: Tensor, weight_Y: Tensor) -> None:
        self.routed(self.number, x_YD, hidden_YF, weight_Y)

    def output(self, y_YD: Tensor) -> None:
        """Ignore the block's output."""


def _expert_hook(block: MoEBlock, sums: list[Tensor], visual_BS: Tensor) -> Callable[..., None]:
    """Return a hook on a block that runs its experts again on the visual rows alone."""
    # Observers get tokens grouped by expert and cannot tell which are visual, so the block runs
    # again on visual rows only. The flag stops the recursion, since that call triggers this hook.
    inside = False

    def after(module: nn.Module, args: tuple[Tensor, ...], _: object) -> None:
        nonlocal inside
        if inside:
            return
        inside = True
        try:
            with observe_experts({block: _ExpertAccumulator(sums, block.num_experts)}):
                module(args[0][visual_BS][None])
        finally:
            inside = False

    return after


def load_calibration_stats(folder: Path) -> CalibrationStats:
    """Read statistics written by `CalibrationStats.save`.

    Raises:
        MissingData: the folder has no calibration.
        UserError: its files are damaged or were changed.
    """
    from safetensors.torch import load_file

    try:
        facts = json.loads((folder / FACTS_FILE).read_text(encoding="utf-8"))
        tensors = load_file(folder / TENSORS_FILE)
    except FileNotFoundError:
        raise MissingData(
            f"calibration_folder={folder} has no {FACTS_FILE} and {TENSORS_FILE}: give a folder "
            "written by CalibrationStats.save, or null to calibrate in this run"
        ) from None
    except Exception as error:
        raise UserError(f"calibration_folder={folder} cannot be read: {error}") from None
    found = CalibrationStats(
        last=tensors["last"],
        text=tensors["text"],
        neurons=[
            [tensors[f"neurons.{layer}.{unit}"] for unit in range(count)]
            for layer, count in enumerate(facts["units"])
        ],
        cut_kl=facts["cut_kl"],
        prompt=PromptLengths(**facts["prompt"]),
        samples=facts["samples"],
    )
    if found.origin != facts["origin"]:
        raise UserError(
            f"calibration_folder={folder}: {FACTS_FILE} or {TENSORS_FILE} was changed after it was "
            "written; calibrate again"
        )
    return found


def calibration_stats_for(
    folder: str | None, engine: VisualEngine, context: Context
) -> CalibrationStats:
    """Return statistics read from a folder, or measured on the run's calibration prompts.

    Measured statistics are shared by all strategies of a run.

    Raises:
        UserError: the folder belongs to a different model, or the run has no calibration prompts.
    """
    if folder is not None:
        found = load_calibration_stats(Path(folder).expanduser())
        _refuse_mismatch(found, engine, folder)
        return found
    samples = require_samples(context)
    known = _measured.setdefault(engine, {})
    if samples.fingerprint not in known:
        known[samples.fingerprint] = calibrate(engine, samples, context.progress)
    return known[samples.fingerprint]


def require_samples(context: Context) -> ProcessedPrompts:
    """Return the run's calibration prompts.

    Raises:
        UserError: the run has none.
    """
    given = context.prompts
    if given is None or not given.inputs:
        raise UserError(
            "visual token strategies are calibrated on prompts with images, but this run has none: "
            "set prompts=NAME, calibration_folder= to a saved calibration, or choose=first or "
            "random"
        )
    return given


def _refuse_mismatch(stats: CalibrationStats, engine: VisualEngine, folder: str) -> None:
    """Raise if the statistics belong to a network of different sizes."""
    heads = engine.decoder.layers[0].attention_view().heads
    mine = (len(engine.decoder.layers), heads)
    theirs = tuple(stats.last.shape[1:])
    widths = [[unit.width for unit in layer.units()] for layer in engine.decoder.layers]
    same = widths == [[len(score_F) for score_F in units] for units in stats.neurons]
    if mine != theirs or not same:
        raise UserError(
            f"calibration_folder={folder} is for {theirs[0]} layers with {theirs[1]} heads, but "
            f"the model has {mine[0]} with {mine[1]}, or feed-forwards of a different width: "
            "calibrate this model"
        )
