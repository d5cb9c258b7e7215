"""Scores of heads, neurons and layers, measured on a few prompts in one dense pass each.

Shapes: B samples, S tokens, T text rows, N visual rows, R query rows, H query heads, G key-value
heads, L layers, D d_model, F a feed-forward's width, d a head's width, C layer cuts.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor

from bench.data.prompts.samples import Inputs
from bench.errors import UserError
from bench.models.multimodal import Samples, VisualTokens, locate
from bench.progress import Progress
from methods.visual_tokens.attendance import attendance
from methods.visual_tokens.attention import Rotary
from methods.visual_tokens.cost import Prompt
from methods.visual_tokens.engine import Engine
from methods.visual_tokens.findings import Findings
from methods.visual_tokens.neuron_scores import NeuronScores
from methods.visual_tokens.rows import Rows, rows_where

NAME = "slimbench_visual_watched"


@torch.no_grad()
def measure(engine: Engine, samples: Samples, progress: Progress) -> Findings:
    """Score every head, neuron and layer cut of the dense network on the given prompts.

    Raises:
        UserError: a prompt has no image.
    """
    neurons = NeuronScores(engine.decoder.layers)
    last, text, kls, lengths = [], [], [], []
    for call in progress.track(samples.inputs, "calibrating on images"):
        tokens = locate(engine.network, call)
        if tokens is None:
            raise UserError("a calibration prompt has no image: visual strategies need one in each")
        watch = Watch(engine, tokens, call)
        with engine.dense(), watch.watching(), neurons.watching(tokens.mask):
            logits_BV = engine.network(**call, use_cache=False, logits_to_keep=1).logits[:, -1]
        last.append(watch.ratios("last"))
        text.append(watch.ratios("text"))
        kls.append(watch.cut_divergence(logits_BV))
        lengths.append(_lengths(tokens, watch.text))
    return Findings(
        last=_renumbered(torch.cat(last), engine),
        text=_renumbered(torch.cat(text), engine),
        neurons=[
            [engine.prepared.numbered(i, n, score_F) for n, score_F in enumerate(units)]
            for i, units in enumerate(neurons.scores())
        ],
        cut_kl=[*torch.stack(kls).mean(dim=0).tolist(), 0.0],
        prompt=_mean_prompt(lengths),
        samples=samples.fingerprint,
    )


class Watch:
    """Recorder of one dense pass: attention sums, and text rows at the input of every layer."""

    def __init__(self, engine: Engine, tokens: VisualTokens, call: Inputs) -> None:
        self.engine, self.tokens = engine, tokens
        mask = call.get("attention_mask")
        self.real_BS = torch.ones_like(tokens.mask) if mask is None else mask.bool()
        self.text: Rows = rows_where(self.real_BS & ~tokens.mask)
        self._sums: dict[str, list[Tensor]] = {"last": [], "text": []}
        self._states: list[Tensor] = []
        self._rotary: Rotary | None = None

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Record the network's next forward."""
        from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

        network, decoder = cast(Any, self.engine.network), self.engine.decoder
        # Hooks cannot see queries and keys after rotation. Registering an attention function of our
        # own is the interface of transformers that passes them, for every architecture alike; its
        # mask function must be registered under the same name, or no padding mask is made.
        before = decoder.config._attn_implementation
        ALL_ATTENTION_FUNCTIONS.register(NAME, self._attention)
        ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, sdpa_mask)
        network.set_attn_implementation({"text_config": NAME})
        hooks = [
            layer.module.register_forward_pre_hook(self._enter, with_kwargs=True)
            for layer in decoder.layers
        ]
        try:
            yield
        finally:
            network.set_attn_implementation({"text_config": before})
            for hook in hooks:
                hook.remove()

    def ratios(self, queries: str) -> Tensor:
        """Return visual over text attention mass of every head, [B, L, H]."""
        return torch.stack(self._sums[queries], dim=1).cpu()

    def cut_divergence(self, dense_BV: Tensor) -> Tensor:
        """Return the KL divergence from the dense answer for cuts 1 to L - 1, [L - 1] nats.

        Layers before a cut equal the dense pass, so only text rows after it are computed. Each
        layer processes the rows of all earlier cuts in one batch.
        """
        layers, rotary = self.engine.decoder.layers, cast(Rotary, self._rotary)
        who = attendance(self.text, None, None, None, None, 0)
        streams = self._states[0][:0]
        for layer in layers[1:]:
            # The batch grows by one cut per layer: entry c holds the text rows that lost their
            # visual tokens before layer c. L (L - 1) / 2 layer passes over text rows give all cuts,
            # where a full pass per cut would repeat the visual rows each time.
            streams = torch.cat([streams, self._states[layer.index]])
            repeats = len(streams) // len(dense_BV)
            angles = tuple(
                part.expand(len(dense_BV), -1, -1).repeat(repeats, 1, 1) for part in rotary
            )
            mask = None if who.text_BTK is None else who.text_BTK.repeat(repeats, 1, 1, 1)
            streams = layer.module(streams, attention_mask=mask, position_embeddings=angles)
        norm = cast(Any, self.engine.decoder.module).norm
        head = cast(Any, self.engine.network).get_output_embeddings()
        cut_CBV = head(norm(streams[:, -1])).unflatten(0, (len(layers) - 1, len(dense_BV)))
        dense_BV = dense_BV.double().log_softmax(-1)
        distance: Tensor = dense_BV.exp() * (dense_BV - cut_CBV.double().log_softmax(-1))
        return distance.sum(dim=-1).mean(dim=1)

    def _enter(self, _: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden_BSD = args[0] if args else kwargs["hidden_states"]
        self._states.append(self.text.take(hidden_BSD))
        if self._rotary is None:
            cos, sin = kwargs["position_embeddings"]
            self._rotary = (self.text.take(cos), self.text.take(sin))

    def _attention(
        self, module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, **rest: Any
    ) -> tuple[Tensor, None]:
        """Attend as SDPA does, and add up attention over visual and over text keys per row."""
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        every = self.text.index_BR
        for name, rows_BR in (("last", every[:, -1:]), ("text", every)):
            self._sums[name].append(self._ratio(q, k, rows_BR, rest["scaling"]))
        attended: tuple[Tensor, None] = sdpa_attention_forward(module, q, k, v, mask, **rest)
        return attended

    def _ratio(self, q_BHSd: Tensor, k_BGSd: Tensor, rows_BR: Tensor, scaling: float) -> Tensor:
        """Return visual over text attention mass of some query rows, [B, H].

        Their softmax rows [R, S] are the only part of the S x S matrix that is ever materialised.
        """
        k_BHSd = k_BGSd.repeat_interleave(q_BHSd.shape[1] // k_BGSd.shape[1], dim=1)
        index_BHRd = rows_BR[:, None, :, None].expand(-1, q_BHSd.shape[1], -1, q_BHSd.shape[3])
        scores = q_BHSd.gather(2, index_BHRd).float() @ k_BHSd.float().transpose(2, 3) * scaling
        places_S = torch.arange(k_BHSd.shape[2], device=rows_BR.device)
        seen_BRS = (places_S <= rows_BR[..., None]) & self.real_BS[:, None]
        weight = scores.masked_fill(~seen_BRS[:, None], -torch.inf).softmax(dim=-1)
        # Rows are the last R text rows, so their validity is the end of that of all. Padded rows
        # have no attention mass to count.
        real_BR = self.text.validity[:, -rows_BR.shape[1] :]
        mass_BHS = torch.where(real_BR[:, None, :, None], weight, 0).sum(dim=2)
        visual_BH = (mass_BHS * self.tokens.mask[:, None]).sum(dim=-1)
        return visual_BH / (mass_BHS.sum(dim=-1) - visual_BH)


def _renumbered(ratio_ILH: Tensor, engine: Engine) -> Tensor:
    """Order scores of heads by their numbers in the loaded network."""
    order_LH = torch.tensor(engine.prepared.head_order()).expand_as(ratio_ILH)
    return torch.zeros_like(ratio_ILH).scatter(2, order_LH, ratio_ILH)


def _lengths(tokens: VisualTokens, text: Rows) -> Tensor:
    """Return mean visual tokens, text tokens before the last visual one, and text tokens, [3]."""
    places_S = torch.arange(tokens.mask.shape[1], device=text.index_BR.device)
    last_B1 = (tokens.mask * places_S).amax(dim=1, keepdim=True)
    before_BR = text.validity & (text.index_BR < last_B1)
    counts = (tokens.mask.sum(1), before_BR.sum(1), text.validity.sum(1))
    return torch.stack([count.double().mean() for count in counts])


def _mean_prompt(lengths: list[Tensor]) -> Prompt:
    visual, before, text = (round(x) for x in torch.stack(lengths).mean(dim=0).tolist())
    return Prompt(visual, before, text, float(visual))
