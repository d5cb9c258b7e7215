"""Gram matrices of the inputs of a decoder's projections, layer by layer.

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
"""Maximum size of the activations of one layer that `LayerReplay` stores."""
_BANDS = 8


class LayerGram:
    """Σ_t φ_t φ_tᵀ of the inputs of a projection, [M, M] in float64, and the number of tokens.

    The product of each call is computed in float32, like φ itself, and summed in float64. Only the
    upper triangle is computed, in bands, which takes 9/16 of the work.
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
    """Yield the Gram matrix of each layer's readout (its output projection), in order.

    With `sequential`, the caller may change a layer after its matrix is yielded, and the next layer
    is observed on the outputs of the changed one.
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
    """Yield the same as `observe_text` for calls of the whole network, such as image prompts.

    With `sequential`, each `LAYERS_AT_ONCE` layers are observed together, on the outputs of the
    changed layers before them.
    """
    step = LAYERS_AT_ONCE if sequential else len(readouts)
    for start in range(0, len(readouts), step):
        grams = {readout: LayerGram(readout) for readout in readouts[start : start + step]}
        for call in calls:
            mask = call.get("attention_mask")
            real_BS = torch.ones_like(call["input_ids"]) if mask is None else mask
            with observe_inputs(grams, real_BS.bool()):
                # Only activations inside the layers are needed; logits_to_keep=1 computes the
                # fewest logits.
                cast(Any, model.network)(**call, use_cache=False, logits_to_keep=1)
        yield from grams.values()


class LayerReplay:
    """Records what a layer computes before its readout, so that only the rest has to run again.

    Between the two runs only the readout changes. The recording holds the inputs of the readout and
    the outputs of all children with matrices that run before it. In the replay, the projections
    that feed the readout return zeros, which are not used. If the recording would exceed
    `REPLAY_BYTES`, or the readout is not that of a feed-forward, the whole layer runs again.
    """

    def __init__(self, layer: nn.Module, readout: nn.Module, tokens: int) -> None:
        found = [part for part in feed_forwards(layer) if part.down is readout]
        kept = tokens * sum(shape_of(readout)) * weight_of(readout).element_size()
        self._sources = found[0].sources if found and kept <= REPLAY_BYTES else ()
        self._readout = readout
        used = {readout, *self._sources}
        self._outputs: dict[nn.Module, list[object]] = {}
        if self._sources:
            for child in layer.children():
                has_matrices = any(weight.ndim > 1 for weight in child.parameters())
                if has_matrices and used.isdisjoint(child.modules()):
                    self._outputs[child] = []
        self._inputs: list[Tensor] = []

    @contextmanager
    def recorded(self) -> Iterator[None]:
        """Record the run inside the `with` block."""

        def record_output(module: nn.Module, _: object, output: object) -> None:
            self._outputs[module].append(output)

        def record_input(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            self._inputs.append(args[0])

        with ExitStack() as stack:
            if self._sources:
                stack.callback(self._readout.register_forward_pre_hook(record_input).remove)
            for child in self._outputs:
                stack.callback(child.register_forward_hook(record_output).remove)
            yield

    @contextmanager
    def replayed(self) -> Iterator[None]:
        """Replay the recording inside the `with` block, call by call in the recorded order."""
        with ExitStack() as stack:
            if self._sources:
                inputs, project = iter(self._inputs), self._readout.forward
                stack.enter_context(
                    replaced_forward(self._readout, lambda *_: project(next(inputs)))
                )
            for source in self._sources:
                rows = shape_of(source)[0]
                stack.enter_context(replaced_forward(source, partial(_zeros, rows=rows)))
            # Children that run after the readout have recorded nothing, since the run stopped
            # there, and run normally.
            for child, outputs in self._outputs.items():
                if outputs:
                    stack.enter_context(replaced_forward(child, partial(_next, iter(outputs))))
            yield


def _zeros(x: Tensor, *, rows: int) -> Tensor:
    return x.new_zeros(*x.shape[:-1], rows)


def _next(outputs: Iterator[object], *_: object, **__: object) -> object:
    return next(outputs)
