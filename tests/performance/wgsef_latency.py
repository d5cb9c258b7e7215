"""Time and memory of networks that WGSEF trained and removed filters from, over the dense ones.

The method trains on the embedded digits at a ratio of 70 % over the whole network, so the widths
are those of its own selection; both networks then run in torch on one thread. The accuracy is no
goal here: a training of a few epochs finds a selection, and the time depends on that alone.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from bench.device.memory import PeakMemory
from bench.method import Context, RecipeConfig
from bench.models.classifiers.architectures import build_classifier
from bench.models.classifiers.classifier import VisionConfig
from bench.models.model import Model
from bench.schema import ModelConfig
from methods.wgsef.sparse_training import Wgsef
from tests.performance.figure import Figure
from tests.performance.interleaved import ratio, times

RATIO = 0.7
BATCHES = (1, 32)
ROUNDS = 15
SIZE = 8
EPOCHS = {"micro_resnet": 10, "resnet18": 1}
GOALS = {"micro_resnet": 1.0, "resnet18": 0.5}


def figures() -> list[Figure]:
    """Measure at batch 1 and 32, on images as large as those of the training."""
    torch.set_num_threads(1)
    return [figure for name in GOALS for figure in _measure(name)]


def _measure(name: str) -> list[Figure]:
    torch.manual_seed(0)
    config = VisionConfig(architecture=name, channels=1, size=SIZE)
    dense = build_classifier(config).eval()
    recipe = RecipeConfig(epochs=EPOCHS[name])
    model = Model(
        ModelConfig(name=name, source=name),
        build_classifier(config),
        None,
        "",
        None,
        torch.device("cpu"),
    )
    report = Wgsef(ratio=RATIO, recipe=recipe).apply(model, Context(seed=1))
    small = model.network.eval()
    kept, groups = report.details["kept"], report.details["groups"]
    what = f"{name} that WGSEF trained to {kept} of {groups} filters"
    found = []
    for batch in BATCHES:
        image_BCHH = torch.randn(batch, 1, SIZE, SIZE)
        whole, cut = times([_forward(n, image_BCHH) for n in (dense, small)], ROUNDS)
        least, value = ratio(cut, whole)
        how = f"median of {ROUNDS}, interleaved; minimum {least:.2f}; {SIZE}x{SIZE}"
        title = f"time of {what} / dense, batch {batch}"
        found.append(Figure(title, value, f"<= {GOALS[name]:g}", value <= GOALS[name], how))
    weights = _bytes(small) / _bytes(dense)
    found.append(Figure(f"bytes of {what} / dense", weights, "<= 0.5", weights <= 0.5, "counted"))
    image_BCHH = torch.randn(BATCHES[-1], 1, SIZE, SIZE)
    peaks = [_peak(network, image_BCHH) for network in (small, dense)]
    how = f"above the weights, batch {BATCHES[-1]}; dense {peaks[1] / 2**20:.1f} MiB"
    title = f"peak memory of a forward of {what} / dense"
    # Below a MiB the reading is mostly the heap's own granularity.
    value = peaks[0] / max(1, peaks[1])
    return [*found, Figure(title, value, "none", True, how)]


def _bytes(network: nn.Module) -> int:
    return sum(weight.numel() * weight.element_size() for weight in network.state_dict().values())


def _peak(network: nn.Module, image_BCHH: torch.Tensor) -> int:
    forward = _forward(network, image_BCHH)
    with PeakMemory(torch.device("cpu")) as peak:
        forward()
    return peak.above


def _forward(network: nn.Module, image_BCHH: torch.Tensor) -> Callable[[], object]:
    def forward() -> object:
        with torch.inference_mode():
            return network(image_BCHH)

    return forward
