"""A decoder run one layer at a time over many rows, so that a method can change each layer in turn.

Shapes: B rows, L tokens per row, D d_model.

All rows have the same length and no padding, so everything that a layer receives besides the hidden
states (masks, positions, rotary embeddings) depends only on the number of rows in a batch. It is
recorded by sending each batch size once through a decoder whose layers return their input.

A model larger than its device runs the same way: the weights of one layer at a time are on the
device, and hidden states wait in CPU memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Self, cast

import torch
from torch import Tensor, nn

from bench.errors import UserError
from bench.models.network import TransformersNetwork, replaced_forward, text_config
from bench.models.offload import execution_device, is_offloaded, onloaded

LayerArguments = tuple[tuple[object, ...], dict[str, object]]


class LayerStream:
    """Hidden states of all rows at the input of the current decoder layer.

    As a context manager it also onloads the weights of the current layer, so that they can be
    changed until the stream moves to another layer or the block ends.
    """

    def __init__(
        self, network: nn.Module, layers: tuple[nn.Module, ...], tokens_BL: Tensor, batch: int
    ) -> None:
        self.layers = layers
        self._arguments: dict[int, list[LayerArguments]] = {}
        self._states: list[Tensor] = []
        whole = cast(TransformersNetwork, network)
        _refuse_more_tokens_than_positions(whole, tokens_BL.shape[1])
        self._device = execution_device(whole.get_input_embeddings())
        offloaded = any(is_offloaded(layer) for layer in layers)
        # Hidden states of all calibration rows can exceed the weights of one layer many times; a
        # model that was offloaded for lack of memory has no room for them on the device.
        self._waiting = torch.device("cpu") if offloaded else self._device
        self._onloaded_index: int | None = None
        self._onload_stack = ExitStack()
        for rows_BL in torch.split(tokens_BL, batch):
            self._enter(whole.get_decoder(), rows_BL)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._onload_stack.close()

    @torch.no_grad()
    def run(self, index: int, *, advance: bool) -> None:
        """Send all rows through layer `index`; with `advance` the outputs become the next inputs.

        Hooks and observers on the layer see every row exactly once per call.
        """
        self.onload_layer(index)
        for place, state_BLD in enumerate(self._states):
            args, kwargs = self._arguments[len(state_BLD)][index]
            output = self.layers[index](state_BLD.to(self._device), *args, **kwargs)
            if advance:
                # Some decoder layers return (hidden states, ...), others the tensor alone.
                output_BLD = output[0] if isinstance(output, tuple) else output
                self._states[place] = output_BLD.to(self._waiting)

    def onload_layer(self, index: int) -> None:
        """Write back the weights of the previous layer and onload those of layer `index`."""
        # A layer is usually run twice (observe, then advance after the change). Its weights are
        # written back once, when the stream leaves it.
        if self._onloaded_index != index:
            self._onload_stack.close()
            self._onload_stack.enter_context(onloaded(self.layers[index]))
            self._onloaded_index = index

    @torch.no_grad()
    def _enter(self, decoder: nn.Module, rows_BL: Tensor) -> None:
        """Store the embeddings of some rows, and each layer's arguments for this batch size."""
        rows_BL = rows_BL.to(self._device)
        try:
            with _recorded_arguments(self.layers, in_tuple=False) as (inputs, arguments):
                decoder(input_ids=rows_BL, use_cache=False)
        except _CutStateError:
            with _recorded_arguments(self.layers, in_tuple=True) as (inputs, arguments):
                decoder(input_ids=rows_BL, use_cache=False)
        self._states.append(inputs[0].to(self._waiting))
        # Arguments are stored per number of rows, since masks and positions have a batch dimension
        # and the last batch can be smaller. Equal batch sizes share one entry: rows have one length
        # and no padding, so the content is the same as well.
        self._arguments.setdefault(len(rows_BL), arguments)


def _refuse_more_tokens_than_positions(network: TransformersNetwork, length: int) -> None:
    """Raise if a decoder with a table of positions (GPT-2, OPT) gets more tokens than it has."""
    limit = getattr(text_config(cast(nn.Module, network)), "max_position_embeddings", None)
    tables = [
        part
        for part in network.get_decoder().modules()
        if isinstance(part, nn.Embedding) and part is not network.get_input_embeddings()
    ]
    # Rotary positions have no table, and no end.
    if limit is not None and tables and length > limit:
        raise UserError(
            f"calibration.length={length} is more than the {limit} positions of "
            f"{type(network).__name__}: lower calibration.length"
        )


class _CutStateError(Exception):
    """A decoder took the first element of what a layer returned."""


@contextmanager
def _recorded_arguments(
    layers: tuple[nn.Module, ...], *, in_tuple: bool
) -> Iterator[tuple[list[Tensor], list[LayerArguments]]]:
    """Make layers return their input and record the arguments of their calls."""
    inputs: list[Tensor] = []
    arguments: list[LayerArguments] = []

    # One forward of the decoder with pass-through layers records the arguments of all layers and
    # computes none of them; `inputs[0]` is the embedding output. Trap: a decoder whose
    # layers return a tuple (Falcon) takes its first element, which cuts a tensor along the batch.
    def passing(hidden_BLD: Tensor, *args: object, **kwargs: object) -> Tensor | tuple[Tensor]:
        if inputs and hidden_BLD.shape != inputs[0].shape:
            raise _CutStateError
        inputs.append(hidden_BLD)
        arguments.append((args, kwargs))
        return (hidden_BLD,) if in_tuple else hidden_BLD

    with ExitStack() as stack:
        for layer in layers:
            stack.enter_context(replaced_forward(layer, passing))
        yield inputs, arguments
