"""Run a decoder layer by layer over many rows, so that a method can change each layer in turn.

Shapes: B rows, L tokens per row, D d_model.

All inputs of a layer besides the hidden states (masks, positions, rotary embeddings) are recorded
by sending the rows through a decoder whose layers return their input. All rows have the same length
and no padding, so in most decoders these inputs depend only on the number of rows in a batch, and
are stored once for each number. If layers also get the tokens (DeepSeek-V4), they are stored for
each batch. Some layers return more than hidden states, which the decoder passes to later layers
(GLM-5's selected keys); these values are passed on likewise.

A model larger than its device runs the same way: the weights of one layer at a time are on the
device, and hidden states are stored in CPU memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Self, cast

import torch
from torch import Tensor, nn

from bench.errors import UserError, error_sentence
from bench.models.network import TransformersNetwork, replaced_forward, text_config
from bench.models.offload import execution_device, is_offloaded, onloaded

LONGEST_OUTPUT = 3

LayerArguments = tuple[tuple[object, ...], dict[str, object]]


# A layer may return the hidden states alone, or a tuple that starts with them.
@dataclass(frozen=True)
class _FromLayer:
    """Placeholder, in the arguments of a layer, for a value that an earlier layer returned."""

    layer: int
    part: int


class LayerStream:
    """Hidden states of all rows at the input of the current decoder layer.

    As a context manager it also onloads the weights of the current layer, which can be changed
    until the stream moves to another layer or the block ends.
    """

    def __init__(
        self, network: nn.Module, layers: tuple[nn.Module, ...], tokens_BL: Tensor, batch: int
    ) -> None:
        self.layers = layers
        # One per batch, in order; batches with equal arguments share an entry.
        self._arguments: list[list[LayerArguments]] = []
        self._states: list[Tensor] = []
        # Per batch, the values besides hidden states that layers have returned.
        self._returned: list[dict[_FromLayer, object]] = []
        typed = cast(TransformersNetwork, network)
        _refuse_more_tokens_than_positions(typed, tokens_BL.shape[1])
        self._device = execution_device(typed.get_input_embeddings())
        offloaded = any(is_offloaded(layer) for layer in layers)
        # Hidden states of all calibration rows can be much larger than a layer's weights, so they
        # do not fit on the device of a model that is offloaded for lack of memory.
        self._waiting = torch.device("cpu") if offloaded else self._device
        self._onloaded_index: int | None = None
        self._onload_stack = ExitStack()
        for rows_BL in torch.split(tokens_BL, batch):
            self._enter(typed.get_decoder(), rows_BL)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._onload_stack.close()

    @torch.no_grad()
    def run_until(self, index: int, module: nn.Module) -> None:
        """Send all rows through layer `index` up to the input of one of its modules.

        Hooks on earlier modules, and before the forward of `module`, see every row exactly once.
        """
        self.onload_layer(index)

        def stop(*_: object, **__: object) -> None:
            raise _ReachedError

        with replaced_forward(module, stop):
            for place in range(len(self._states)):
                with suppress(_ReachedError):
                    self._output(index, place)

    @torch.no_grad()
    def run(self, index: int, *, advance: bool) -> None:
        """Send all rows through layer `index`; with `advance` its outputs become the next inputs.

        Hooks and observers of the layer see every row exactly once per call.
        """
        self.onload_layer(index)
        for place in range(len(self._states)):
            output = self._output(index, place)
            if advance:
                returned = self._returned[place]
                # Some decoder layers return (hidden states, ...), others the tensor alone.
                output_BLD, *more = output if isinstance(output, tuple) else (output,)
                self._states[place] = output_BLD.to(self._waiting)
                for part, value in enumerate(more, start=1):
                    returned[_FromLayer(index, part)] = value
                waited_for = _references(self._arguments[place][index + 1 :])
                for key in returned.keys() - waited_for:
                    del returned[key]

    def _output(self, index: int, place: int) -> object:
        """Return the output of a layer for one batch."""
        returned = self._returned[place]
        args, kwargs = self._arguments[place][index]
        return self.layers[index](
            self._states[place].to(self._device),
            *(_resolved(value, returned) for value in args),
            **{name: _resolved(value, returned) for name, value in kwargs.items()},
        )

    def onload_layer(self, index: int) -> None:
        """Write back the weights of the previous layer and onload those of layer `index`."""
        # A layer usually runs twice (observe, then advance after the change), but its weights are
        # written back only once, when the stream leaves it.
        if self._onloaded_index != index:
            self._onload_stack.close()
            self._onload_stack.enter_context(onloaded(self.layers[index]))
            self._onloaded_index = index

    @torch.no_grad()
    def _enter(self, decoder: nn.Module, rows_BL: Tensor) -> None:
        """Store the embeddings of some rows, and each layer's arguments for this batch size."""
        rows_BL = rows_BL.to(self._device)
        state_BLD, arguments = _record(decoder, self.layers, rows_BL)
        self._states.append(state_BLD.to(self._waiting))
        self._returned.append({})
        # Only the last batch may have a different number of rows, so comparing two suffices.
        if self._arguments and _equal(self._arguments[-1], arguments):
            arguments = self._arguments[-1]
        self._arguments.append(arguments)


def _references(arguments: list[LayerArguments]) -> set[_FromLayer]:
    """Return the placeholders in the arguments of some layers."""
    values = [value for args, kwargs in arguments for value in (*args, *kwargs.values())]
    return {value for value in values if isinstance(value, _FromLayer)}


def _resolved(value: object, returned: dict[_FromLayer, object]) -> object:
    return returned[value] if isinstance(value, _FromLayer) else value


def _equal(one: object, other: object) -> bool:
    """Whether two nested containers hold equal tensors and values."""
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.shape == other.shape and torch.equal(one, other)
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_equal(one[k], other[k]) for k in one)
    if isinstance(one, tuple | list) and isinstance(other, tuple | list):
        return len(one) == len(other) and all(map(_equal, one, other))
    # Objects such as masks of flex attention cannot be compared, so they are equal if identical.
    plain = isinstance(one, bool | int | float | str | _FromLayer)
    return one is other or (plain and one == other)


def _refuse_more_tokens_than_positions(network: TransformersNetwork, length: int) -> None:
    """Raise if a decoder with learned positions (GPT-2, OPT) gets more tokens than it has."""
    limit = getattr(text_config(cast(nn.Module, network)), "max_position_embeddings", None)
    tables = [
        part
        for part in network.get_decoder().modules()
        if isinstance(part, nn.Embedding) and part is not network.get_input_embeddings()
    ]
    # Rotary positions have no table and no limit.
    if limit is not None and tables and length > limit:
        raise UserError(
            f"calibration.length={length} is more than the {limit} positions of "
            f"{type(network).__name__}: lower calibration.length"
        )


class _ReachedError(Exception):
    """A run reached the module at which it stops."""


class _CutStateError(Exception):
    """A decoder took the first element of a layer's output."""


def _record(
    decoder: nn.Module, layers: tuple[nn.Module, ...], rows_BL: Tensor
) -> tuple[Tensor, list[LayerArguments]]:
    """Return the embeddings of some rows and the arguments of each layer.

    Raises:
            UserError: the decoder does not expect hidden states, or a short tuple that starts with
                them, from its layers.
    """
    failure: Exception = _CutStateError()
    for length in range(LONGEST_OUTPUT + 1):
        try:
            with _recorded_arguments(layers, length) as (inputs, arguments):
                decoder(input_ids=rows_BL, use_cache=False)
        # The exception of a failed unpacking depends on the value. Other errors occur again in the
        # last attempt, whose message is reported.
        except (_CutStateError, TypeError, ValueError, AttributeError) as error:
            failure = error
        else:
            return inputs[0], arguments
    raise UserError(
        f"{type(decoder).__name__} cannot be run one layer at a time, which this method needs: "
        f"{error_sentence(failure)}"
    )


@contextmanager
def _recorded_arguments(
    layers: tuple[nn.Module, ...], length: int
) -> Iterator[tuple[list[Tensor], list[LayerArguments]]]:
    """Make layers return their input, and record the arguments of their calls.

    With `length` 0 they return the tensor, else a tuple of this length.
    """
    inputs: list[Tensor] = []
    arguments: list[LayerArguments] = []

    # One forward with pass-through layers records the arguments of all layers without computing
    # them; `inputs[0]` is the embeddings. If a decoder unpacks a tuple, a tensor would be unpacked
    # along the batch without an error when it has as many rows as the tuple has elements.
    def passing(hidden_BLD: Tensor, *args: object, **kwargs: object) -> Tensor | tuple[object, ...]:
        if not isinstance(hidden_BLD, Tensor) or (inputs and hidden_BLD.shape != inputs[0].shape):
            raise _CutStateError("a layer's output is cut")
        inputs.append(hidden_BLD)
        arguments.append((args, kwargs))
        if not length:
            return hidden_BLD
        layer = len(arguments) - 1
        return (hidden_BLD, *(_FromLayer(layer, part) for part in range(1, length)))

    with ExitStack() as stack:
        for layer in layers:
            stack.enter_context(replaced_forward(layer, passing))
        yield inputs, arguments
