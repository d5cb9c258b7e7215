"""Gram matrices of what the projections of a decoder's layers read, layer by layer.

Shapes: B rows, S tokens of a row, T tokens of a call, M activations that a projection reads.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from bench.models.layer_stream import LayerStream
from bench.models.model import Model
from bench.models.network import replaced_forward
from bench.models.structure.dense_layer import feed_forwards, shape_of, weight_of
from methods.moe.calibration import observe_inputs

ModelInputs = Mapping[str, Tensor]
LAYERS_AT_ONCE = 4
"""Layers measured per pass over prompts; their [M, M] Gram matrices are in memory together."""
REPLAY_BYTES = 1 << 30
"""Most that may be kept of one layer so that what comes before its projection runs only once."""
_BANDS = 8


class LayerGram:
    """Σ_t φ_t φ_tᵀ of the inputs of a projection, [M, M] in float64, and the number of tokens.

    The product of a call is float32, in which the network computes φ as well; calls add up in
    float64. Only the upper triangle is computed, in bands, at 9/16 of the work.
    """

    def __init__(self, projection: nn.Module) -> None:
        width = shape_of(projection)[1]
        device = weight_of(projection).device
        self._upper_MM = torch.zeros(width, width, dtype=torch.float64, device=device)
        self.tokens = 0

    def add(self, x_TM: Tensor) -> None:
        """Add some tokens."""
        exact_TM = x_TM if x_TM.dtype == torch.float64 else x_TM.float()
        width = exact_TM.shape[1]
        band = -(-width // _BANDS)
        for start in range(0, width, band):
            rows = slice(start, start + band)
            self._upper_MM[rows, start:] += exact_TM[:, rows].T @ exact_TM[:, start:]
        self.tokens += len(x_TM)

    def mean(self) -> Tensor:
        """Return Σ_t φ_t φ_tᵀ / T, symmetric."""
        upper_MM = self._upper_MM.triu()
        full_MM: Tensor = upper_MM + upper_MM.triu(1).T
        return full_MM.div_(self.tokens)


def observe_text(
    model: Model, readouts: Sequence[nn.Module], tokens_BS: Tensor, batch: int, *, sequential: bool
) -> Generator[LayerGram, None, None]:
    """Yield the Gram matrix of each layer's readout, one per layer, in order.

    With `sequential` the caller may change a layer between two yields, and the next layer is
    observed behind the changed one.
    """
    layers = model.structure.layers
    with LayerStream(model.network, layers, tokens_BS, batch) as stream:
        for index, readout in enumerate(readouts):
            stream.onload_layer(index)
            gram = LayerGram(readout)
            if not sequential and index < len(layers) - 1:
                with observe_inputs({readout: gram}):
                    stream.run(index, advance=True)
                yield gram
                continue
            replay = LayerReplay(layers[index], readout, tokens_BS.numel())
            with observe_inputs({readout: gram}), replay.recorded():
                stream.run_until(index, readout)
            yield gram
            if index < len(layers) - 1:
                with replay.replayed():
                    stream.run(index, advance=True)


def observe_calls(
    model: Model, readouts: Sequence[nn.Module], calls: Sequence[ModelInputs], *, sequential: bool
) -> Generator[LayerGram, None, None]:
    """Yield the same on calls of the whole network, such as prompts with images.

    With `sequential`, `LAYERS_AT_ONCE` layers are observed together behind the changed ones.
    """
    step = LAYERS_AT_ONCE if sequential else len(readouts)
    for start in range(0, len(readouts), step):
        grams = {readout: LayerGram(readout) for readout in readouts[start : start + step]}
        for call in calls:
            mask = call.get("attention_mask")
            real_BS = torch.ones_like(call["input_ids"]) if mask is None else mask
            with observe_inputs(grams, real_BS.bool()):
                # Only activations inside the layers are needed: logits of the last position are
                # the least the forward can compute.
                cast(Any, model.network)(**call, use_cache=False, logits_to_keep=1)
        yield from grams.values()


class LayerReplay:
    """What a layer computed before its readout, so that the rest runs again without it.

    Only the readout changes between the two runs. Its inputs are kept, and the outputs of all
    children with matrices that ran before it; the projections that feed it then answer with zeros,
    which nobody reads. Where these are too large, or the readout is not that of a feed-forward, the
    layer simply runs again.
    """

    def __init__(self, layer: nn.Module, readout: nn.Module, tokens: int) -> None:
        found = [part for part in feed_forwards(layer) if part.down is readout]
        kept = tokens * sum(shape_of(readout)) * weight_of(readout).element_size()
        self._sources = found[0].sources if found and kept <= REPLAY_BYTES else ()
        self._readout = readout
        used = {readout, *self._sources}
        self._outputs: dict[nn.Module, list[object]] = {
            child: []
            for child in (layer.children() if self._sources else ())
            if any(weight.ndim > 1 for weight in child.parameters())
            and not any(part in used for part in child.modules())
        }
        self._inputs: list[Tensor] = []

    @contextmanager
    def recorded(self) -> Iterator[None]:
        """Keep what a run computes inside the block."""

        def keep(module: nn.Module, _: object, output: object) -> None:
            self._outputs[module].append(output)

        def keep_input(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            self._inputs.append(args[0])

        with ExitStack() as stack:
            if self._sources:
                stack.callback(self._readout.register_forward_pre_hook(keep_input).remove)
            for child in self._outputs:
                stack.callback(child.register_forward_hook(keep).remove)
            yield

    @contextmanager
    def replayed(self) -> Iterator[None]:
        """Answer with what was kept inside the block, in the order of the recorded run."""
        with ExitStack() as stack:
            if self._sources:
                inputs, project = iter(self._inputs), self._readout.forward
                stack.enter_context(
                    replaced_forward(self._readout, lambda *_: project(next(inputs)))
                )
            for source in self._sources:
                rows = shape_of(source)[0]
                stack.enter_context(replaced_forward(source, partial(_zeros, rows=rows)))
            # What ran after the readout has kept nothing, and runs.
            for child, outputs in self._outputs.items():
                if outputs:
                    stack.enter_context(replaced_forward(child, partial(_next, iter(outputs))))
            yield


def _zeros(x: Tensor, *, rows: int) -> Tensor:
    return x.new_zeros(*x.shape[:-1], rows)


def _next(outputs: Iterator[object], *_: object, **__: object) -> object:
    return next(outputs)
