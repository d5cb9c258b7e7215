"""Counts of a forward's operators, and of the numbers that it reads, writes and holds."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from bench.measurement.flops.counter import is_matmul


class Tally(TorchDispatchMode):
    """Counts operators, and the numbers that are read and written outside products.

    `inside` is the number of operators in decoder layers, `widest` the largest number of values in
    results at a time.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch does not say
        self.operators = 0
        self.inside = 0
        self.elements = 0
        self.paused = 0
        self.widest = 0
        self._held = 0
        self._alive = weakref.WeakSet[torch.UntypedStorage]()

    def __torch_dispatch__(
        self, func: Any, types: object, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> object:
        result = func(*args, **(kwargs or {}))
        # A view may be one of a weight, such as a transposed matrix, which is no activation.
        if _is_view(func):
            return result
        for tensor in _tensors([result]):
            self._hold(tensor)
        # Operators of `prim` query a tensor, for example its device, without computing anything.
        if self.paused or func.namespace == "prim":
            return result
        self.operators += 1
        self.elements += _numbers([result])
        name = str(getattr(func, "_overloadpacket", func))
        # A product's inputs are weights, which are counted separately, and previous results; a
        # lookup reads as many numbers as it returns.
        if not is_matmul(name) and "embedding" not in name:
            self.elements += _numbers(args)
        return result

    def _hold(self, result: Tensor) -> None:
        """Count the result of an operator until it is freed, unless it is in place."""
        storage = result.untyped_storage()
        if storage not in self._alive:
            numbers = storage.nbytes() // result.itemsize
            self._alive.add(storage)
            weakref.finalize(storage, self._release, numbers)
            self._held += numbers
            self.widest = max(self.widest, self._held)

    def _release(self, numbers: int) -> None:
        self._held -= numbers


def _is_view(func: object) -> bool:
    """Return whether an operator returns a view of its input."""
    returns = getattr(getattr(func, "_schema", None), "returns", ())
    return any(r.alias_info is not None and not r.alias_info.is_write for r in returns)


def _numbers(values: Iterable[object]) -> int:
    return sum(tensor.numel() for tensor in _tensors(values))


def _tensors(values: Iterable[object]) -> Iterator[Tensor]:
    """Yield tensors of floats among arguments or results, and in lists and tuples of them."""
    for value in values:
        for each in value if isinstance(value, list | tuple) else [value]:
            if isinstance(each, Tensor) and each.is_floating_point():
                yield each


class CountedLayer:
    """Counts a layer's operators `again` more times, and answers for layers of the same form."""

    def __init__(self, tally: Tally, again: int) -> None:
        self._tally, self._again = tally, again
        self._began = 0, 0
        self._output: object = None

    def before(self, *_: object) -> None:
        """Remember the counts before the layer; a forward pre-hook."""
        self._began = self._tally.operators, self._tally.elements

    def after(self, _: nn.Module, __: object, output: object) -> None:
        """Count the layer's operators again; a forward hook."""
        operators, elements = self._began
        once = self._tally.operators - operators
        self._tally.operators += self._again * once
        self._tally.inside += (1 + self._again) * once
        self._tally.elements += self._again * (self._tally.elements - elements)
        self._output = output

    def answer(self, *_: object, **__: object) -> object:
        """Return the layer's output; the forward of the layers of the same form."""
        return self._output
