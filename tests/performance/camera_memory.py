"""How much memory analysis takes beside a layer, and whether packed weights are as small as said.

Shapes: B rows, L tokens a row, D d_model, F width.

Analysis: a model whose layers are on disk is pruned layer by layer, and every byte that
PyTorch holds at a time is counted. Hidden states, which wait in CPU memory whatever the device, are
not part of the goal; the chunk is what the rows that go through a layer together need in it.
"""

from __future__ import annotations

import tempfile
import weakref
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bench.data.calibration import Calibration
from bench.method import Context
from bench.models.bitpacking.packed_modules import packed_linears
from bench.models.loading import open_folder
from bench.models.model import Model
from methods.camera.pruning import CameraP
from methods.camera.quantization import CameraQ
from tests.models.tiny_networks import save
from tests.performance.camera_analysis import EXPERT_WIDTH, small_model
from tests.performance.figure import Figure

ROWS, LENGTH, BATCH, CHUNK = 16, 256, 2, 512
FLOAT = 4
BITS = 2.25


def figures() -> list[Figure]:
    """Peak memory of pruning layer by layer; bytes of packed weights over the arithmetic."""
    torch.set_num_threads(1)
    return [analysis(), packed()]


def analysis() -> Figure:
    """Prune a model from disk and compare the peak with two layers and the chunk."""
    rows_BL = torch.randint(64, (ROWS, LENGTH), generator=torch.manual_seed(0))
    method = CameraP(ratio=0.4, batch=BATCH, chunk=CHUNK)
    with tempfile.TemporaryDirectory() as name:
        model = open_folder(save(small_model().network, Path(name)), device_map="offload_disk")
        layer = sum(weight.numel() * FLOAT for weight in model.structure.layers[0].parameters())
        with Live() as live:
            method.apply(model, Context(0, Calibration(rows_BL, "")))
    block = model.structure.moe[0]
    waiting = rows_BL.numel() * block.d_model * FLOAT
    peak, allowed = live.peak - waiting, 2 * layer + chunk(block.d_model, EXPERT_WIDTH)
    how = f"peak {peak / 1e6:.0f} MB beside hidden states, a layer {layer / 1e6:.0f} MB"
    return Figure("analysis / (two layers + chunk)", peak / allowed, "<= 1", peak <= allowed, how)


def chunk(d_model: int, width: int) -> int:
    """Bytes of the rows that go through a layer together, and of the tokens shown at once.

    Ten tensors [B·L, D]: the input, both norms, query, key, value, attention, both sums, the
    output in float32; five [S, F] of one expert: gate, up, their product, φ and φ².
    """
    return FLOAT * (10 * BATCH * LENGTH * d_model + 5 * CHUNK * width)


def packed() -> Figure:
    """Quantize a model's experts to 2.25 bits and count the bytes of what is stored."""
    model = small_model()
    weights = model.structure.moe_parameters
    rows_BL = torch.randint(64, (4, LENGTH), generator=torch.manual_seed(0))
    method = CameraQ(rounding="rtn", attention_bits=16, shared_bits=16, dense_bits=16)
    method.apply(model, Context(0, Calibration(rows_BL, "")))
    found = stored(model)
    value = found / (weights * BITS / 8)
    how = f"{found / 1e6:.1f} MB for {weights / 1e6:.0f}M weights at {BITS} bits"
    return Figure("packed bytes / arithmetic", value, "0.97 to 1.03", abs(value - 1) <= 0.03, how)


def stored(model: Model) -> int:
    """Bytes of all packed weights, scales, offsets and orders."""
    buffers = (tensor for _, linear in packed_linears(model.network) for tensor in linear.buffers())
    return sum(tensor.numel() * tensor.element_size() for tensor in buffers)


class Live(TorchDispatchMode):
    """Counts the bytes of tensors made inside the `with` that are alive, and their peak."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operator and take note of the storages that it made."""
        before = {self._address(given) for given in tree_leaves((args, kwargs))}
        result = func(*args, **(kwargs or {}))
        for made in tree_leaves(result):
            if isinstance(made, Tensor) and self._address(made) not in before:
                self._note(made)
        return result

    def _note(self, made: Tensor) -> None:
        """Count a new storage until it is freed."""
        storage = made.untyped_storage()
        address, size = storage.data_ptr(), storage.nbytes()
        if made.device.type == "meta" or not size or address in self._known:
            return
        self._known.add(address)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._free, address, size)

    def _free(self, address: int, size: int) -> None:
        self._known.discard(address)
        self.now -= size

    @staticmethod
    def _address(given: Any) -> int | None:
        """Where a tensor's storage is; None for what has none."""
        if not isinstance(given, Tensor) or given.device.type == "meta":
            return None
        return given.untyped_storage().data_ptr()
