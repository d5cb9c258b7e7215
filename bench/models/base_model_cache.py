"""The unchanged base model, kept between the runs of a sweep so that it is loaded once."""

from __future__ import annotations

from itertools import chain

from bench.device import devices
from bench.models.loading import load_model
from bench.models.model import Model
from bench.models.source import ModelSource


class BaseModelCache:
    """Holds the model of one source; a run that changes it gets its own copy."""

    def __init__(self) -> None:
        self._source: ModelSource | None = None
        self._model: Model | None = None

    def acquire(self, source: ModelSource, will_change: bool) -> Model:
        """Return the model of `source`, loading it unless it is already cached.

        Without `will_change` this is the cached model itself, which must not be modified. With it,
        the caller gets a copy if memory allows; otherwise the cached model itself, which is then
        loaded again for the next run.
        """
        if self._model is None or self._source != source:
            # Before loading: two models at once may not fit.
            self.release()
            self._source, self._model = source, _copied_if_room(load_model(source))
            devices.release_memory(self._model.device)
        if not will_change:
            return self._model
        if _has_room_for_copy(self._model):
            return self._model.copy()
        given, self._model = self._model, None
        return given

    def peek(self, source: ModelSource) -> Model | None:
        """Return the cached model of `source` for reading, or None if it was given away."""
        return self._model if self._source == source else None

    def release(self) -> None:
        """Drop the cached model and free its memory."""
        if self._model is not None:
            device = self._model.device
            self._source = self._model = None
            devices.release_memory(device)


def _copied_if_room(loaded: Model) -> Model:
    """Return a copy of a freshly loaded model if memory allows."""
    # On a CPU, a loaded network is 1 to 3 % slower than any copy of it (measured), since its
    # tensors and modules lie scattered in memory. Pruned models are copies, so comparing them with
    # the loaded original would bias every speed-up in their favour.
    return loaded.copy() if _has_room_for_copy(loaded) else loaded


def _has_room_for_copy(model: Model) -> bool:
    """Whether the device can hold a second copy and half as much again for activations.

    A network that accelerate spread over devices is never copied: its hooks refer to it.
    """
    if model.config.device_map is not None:
        return False
    held = chain(model.network.parameters(), model.network.buffers())
    size = sum(tensor.numel() * tensor.element_size() for tensor in held)
    return devices.free_bytes(model.device) > 1.5 * size
