"""Running a decoder one layer at a time over many rows, so that a method can change each in turn.

Shapes: B rows, L tokens a row, D d_model.

Rows have one length and no padding, so what a layer receives beside the hidden states (masks,
positions, rotary embeddings) depends only on how many rows go together; it is recorded by sending
each size of batch once through a decoder whose layers only pass their input on.

A model larger than its device is walked in the same way: the weights of one layer are there at a
time, and hidden states wait in CPU memory for their turn.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Self

import torch
from torch import Tensor, nn

from bench.models.residence import execution_device, is_offloaded, resident

Arguments = tuple[tuple[Any, ...], dict[str, Any]]


class LayerStream:
    """The hidden states of all rows at the door of one decoder layer after the other.

    Used in a `with`, it also holds the weights of the layer that it is in on their device, so that
    they can be changed until it goes to another layer or the `with` ends.
    """

    def __init__(
        self, network: Any, layers: tuple[nn.Module, ...], tokens_BL: Tensor, batch: int
    ) -> None:
        self.layers = layers
        self._arguments: dict[int, list[Arguments]] = {}
        self._states: list[Tensor] = []
        self._device = execution_device(network.get_input_embeddings())
        offloaded = any(is_offloaded(layer) for layer in layers)
        self._waiting = torch.device("cpu") if offloaded else self._device
        self._resident: int | None = None
        self._stay = ExitStack()
        for rows_BL in torch.split(tokens_BL, batch):
            self._enter(network, rows_BL)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._stay.close()

    @torch.no_grad()
    def run(self, index: int, *, advance: bool) -> None:
        """Send all rows through layer `index`; with `advance` its outputs become the next inputs.

        Hooks and observers on the layer see every row exactly once a call.
        """
        self.stay_in(index)
        for place, state_BLD in enumerate(self._states):
            args, kwargs = self._arguments[len(state_BLD)][index]
            output = self.layers[index](state_BLD.to(self._device), *args, **kwargs)
            if advance:
                output_BLD = output[0] if isinstance(output, tuple) else output
                self._states[place] = output_BLD.to(self._waiting)

    def stay_in(self, index: int) -> None:
        """Leave the weights of the layer before where they belong and bring those of this one."""
        if self._resident != index:
            self._stay.close()
            self._stay.enter_context(resident(self.layers[index]))
            self._resident = index

    @torch.no_grad()
    def _enter(self, network: Any, rows_BL: Tensor) -> None:
        """Keep the embeddings of some rows, and each layer's arguments for so many rows."""
        with _recording(self.layers) as (inputs, arguments):
            network.get_decoder()(input_ids=rows_BL.to(self._device), use_cache=False)
        self._states.append(inputs[0].to(self._waiting))
        self._arguments.setdefault(len(rows_BL), arguments)


@contextmanager
def _recording(layers: tuple[nn.Module, ...]) -> Iterator[tuple[list[Tensor], list[Arguments]]]:
    """Make layers hand on their input and record what they are called with."""
    inputs: list[Tensor] = []
    arguments: list[Arguments] = []

    def passing(hidden_BLD: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        inputs.append(hidden_BLD)
        arguments.append((args, kwargs))
        return hidden_BLD

    # accelerate, too, replaces `forward` on instances; what it put there is put back.
    before = [layer.__dict__.get("forward") for layer in layers]
    for layer in layers:
        layer.__dict__["forward"] = passing
    try:
        yield inputs, arguments
    finally:
        for layer, forward in zip(layers, before, strict=True):
            del layer.__dict__["forward"]
            if forward is not None:
                layer.__dict__["forward"] = forward
