"""One unchanged model kept between the runs of a sweep, so that it is loaded once."""

from __future__ import annotations

from itertools import chain

from bench import device as devices
from bench.models.loading import load
from bench.models.model import Model
from bench.models.source import Source


class Pristine:
    """Lends the model of a source; a run that changes it gets its own copy."""

    def __init__(self) -> None:
        self._source: Source | None = None
        self._model: Model | None = None

    def borrow(self, source: Source, will_change: bool) -> Model:
        """Return the model of `source`, loading it only if it is not the one that is kept.

        Without `will_change` this is the kept model itself, which must stay as it is. With it, a
        copy where memory allows; otherwise the kept one is given away and loaded again next time.
        """
        if self._model is None or self._source != source:
            self.release()
            self._source, self._model = source, _copied(load(source))
            devices.release(self._model.device)
        if not will_change:
            return self._model
        if _has_room_for_copy(self._model):
            return self._model.copy()
        given, self._model = self._model, None
        return given

    def beside(self, source: Source) -> Model | None:
        """Return the kept model of `source` to be looked at, None where it was given away."""
        return self._model if self._source == source else None

    def release(self) -> None:
        """Forget the kept model and give its memory back."""
        if self._model is not None:
            device = self._model.device
            self._source = self._model = None
            devices.release(device)


def _copied(loaded: Model) -> Model:
    """Return a copy in place of a model that was just loaded, where memory allows.

    On a CPU a loaded network is 1 to 3 % slower than any copy of it, since its tensors and modules
    lie scattered in memory. What is lent is a copy, and would beat this one for nothing.
    """
    return loaded.copy() if _has_room_for_copy(loaded) else loaded


def _has_room_for_copy(model: Model) -> bool:
    """Whether the device can hold a second copy and half as much again to work with.

    A network that accelerate spread over devices is never copied: its hooks belong to it.
    """
    if model.config.device_map is not None:
        return False
    held = chain(model.network.parameters(), model.network.buffers())
    size = sum(tensor.numel() * tensor.element_size() for tensor in held)
    return devices.free_bytes(model.device) > 1.5 * size
