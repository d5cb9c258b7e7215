"""What can be removed from torchvision's classifiers, and whether their export computes the same.

`wgsef_networks:resnet18,vit_b_16` looks at some of them; all take long. Each line says how many
filters can be removed and how many only stay zeroed, and how far the exported network, read from
its folder, is from the zeroed one; or the sentence that refuses the network.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from torchvision import models

from bench.errors import UserError
from bench.models.classifiers.architectures import build_classifier
from bench.models.classifiers.classifier import VisionConfig
from bench.models.classifiers.serialization import load_classifier_folder, save_classifier
from methods.wgsef.groups.choice import GroupChoice, families_of
from methods.wgsef.groups.partition import GroupPartition
from methods.wgsef.removal import smaller_classifier
from tests.performance.figure import Figure

SIZE, LARGER = 64, {"inception_v3": 96}
SHARE = 0.4
GOAL = 1e-5


def figures(*names: str) -> list[Figure]:
    """Export each network without two fifths of its groups; fresh weights, two random images."""
    return [_figure(name) for name in names or models.list_models(module=models)]


def _figure(name: str) -> Figure:
    torch.manual_seed(0)
    size = LARGER.get(name, SIZE)
    config = VisionConfig(architecture=f"torchvision/{name}", channels=3, size=size, classes=10)
    title = f"exported / zeroed outputs, largest difference ({name})"
    try:
        network = build_classifier(config).eval()
        _draw_constants(network)
        families = families_of(network, GroupChoice(groups=("filters",)))
    except UserError as refused:
        return Figure(title, 0.0, "refused in a sentence", True, str(refused))
    partition = GroupPartition(network, families)
    dead = torch.rand(partition.groups) < SHARE
    partition.scale_((~dead).double())
    parts = zip(families, partition.split(dead), strict=True)
    cut = [(family, gone) for family, gone in parts if family.unremovable_reason is None]
    removable = sum(family.groups for family, _ in cut)
    how = f"{removable} of {partition.groups} groups can be removed, the others stay zeroed"
    if not cut:
        return Figure(title, 0.0, "nothing to remove", True, how)
    images = torch.randn(2, 3, size, size)
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        save_classifier(smaller_classifier(network, *zip(*cut, strict=True)), Path(folder))
        exported = load_classifier_folder(Path(folder))
        expected = network(images)
        difference = float((exported(images) - expected).abs().max() / expected.abs().max())
    return Figure(title, difference, f"<= {GOAL:g}", difference <= GOAL, how)


@torch.no_grad()
def _draw_constants(network: torch.nn.Module) -> None:
    """Draw weights that are constant at first, such as a head of zeros that would hide a fault."""
    for weight in network.parameters():
        if bool((weight == weight.flatten()[0]).all()):
            weight.add_(0.1 * torch.randn_like(weight))
