"""What can be removed from torchvision's classifiers, and whether their export computes the same.

`wgsef_networks:resnet18,vit_b_16` looks at some of them; all take long. Filters, heads and residual
blocks of each are looked at apart: how many can be removed and how many only stay zeroed, and how
far the exported network, read from its folder, is from the zeroed one; or the sentence that refuses
them. `python -m tests.performance.wgsef_networks FILE [NAME ...]` writes the same as a table, in
which networks that are not named stay as they were: so it can be made in pieces.
"""

from __future__ import annotations

import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from torchvision import models

from bench.errors import UserError
from bench.models.classifiers.architectures import build_classifier
from bench.models.classifiers.classifier import Classifier, VisionConfig
from bench.models.classifiers.serialization import load_classifier_folder, save_classifier
from methods.wgsef.groups.choice import ClassifierGroups, GroupChoice, families_of
from methods.wgsef.groups.partition import GroupPartition
from methods.wgsef.removal import smaller_classifier
from tests.performance.figure import Figure

SIZE, LARGER = 64, {"inception_v3": 96}
SHARE = 0.4
GOAL = 1e-5
KINDS: tuple[ClassifierGroups, ...] = ("filters", "heads", "depth")
REMOVABLE = {
    "filters": {"resnet18", "mobilenet_v2", "densenet121", "convnext_tiny", "vgg11_bn"},
    "heads": {"vit_b_16"},
    "depth": {"resnet18", "mobilenet_v2", "convnext_tiny", "vit_b_16"},
}
"""Networks whose groups are not refused: a tracer that refuses all of them is no success."""


@dataclass(frozen=True)
class Trial:
    """Groups of one kind in one network: how many can go, and how far the export is off.

    `difference` is relative to the largest output, None where nothing can be removed; `refused` is
    the sentence that refuses them, else empty.
    """

    removable: int = 0
    groups: int = 0
    difference: float | None = None
    refused: str = ""


def figures(*names: str) -> list[Figure]:
    """Export each network without two fifths of its groups; fresh weights, two random images."""
    return [
        _figure(name, kind, _trial(name, kind))
        for name in names or models.list_models(module=models)
        for kind in KINDS
    ]


def _figure(name: str, kind: str, trial: Trial) -> Figure:
    title = f"exported / zeroed outputs, largest difference ({kind} of {name})"
    if trial.refused:
        may = name not in REMOVABLE[kind]
        return Figure(title, 0.0, "refused in a sentence" if may else "removed", may, trial.refused)
    how = f"{trial.removable} of {trial.groups} groups can be removed, the others stay zeroed"
    if trial.difference is None:
        return Figure(title, 0.0, "nothing to remove", True, how)
    return Figure(title, trial.difference, f"<= {GOAL:g}", trial.difference <= GOAL, how)


def _trial(name: str, kind: ClassifierGroups) -> Trial:
    torch.manual_seed(0)
    size = LARGER.get(name, SIZE)
    config = VisionConfig(architecture=f"torchvision/{name}", channels=3, size=size, classes=10)
    try:
        network = build_classifier(config).eval()
        _draw_constants(network)
        families = families_of(network, GroupChoice(groups=(kind,)))
    except UserError as refused:
        return Trial(refused=str(refused))
    partition = GroupPartition(network, families)
    dead = torch.rand(partition.groups) < SHARE
    partition.scale_((~dead).double())
    parts = zip(families, partition.split(dead), strict=True)
    cut = [(family, gone) for family, gone in parts if family.unremovable_reason is None]
    removable = sum(family.groups for family, _ in cut)
    if not cut:
        return Trial(0, partition.groups)
    smaller = smaller_classifier(network, *zip(*cut, strict=True))
    return Trial(removable, partition.groups, _difference(network, smaller))


@torch.no_grad()
def _difference(zeroed: Classifier, smaller: Classifier) -> float:
    """Return how far the network read from its folder is off, relative to the largest output."""
    images = torch.randn(2, 3, zeroed.config.size, zeroed.config.size)
    expected = zeroed(images)
    with tempfile.TemporaryDirectory() as folder:
        save_classifier(smaller, Path(folder))
        found = load_classifier_folder(Path(folder))(images)
    return float((found - expected).abs().max() / expected.abs().max())


@torch.no_grad()
def _draw_constants(network: torch.nn.Module) -> None:
    """Draw weights that are constant at first, such as a head of zeros that would hide a fault."""
    for weight in network.parameters():
        if bool((weight == weight.flatten()[0]).all()):
            weight.add_(0.1 * torch.randn_like(weight))


HEADER = f"| torchvision | {' | '.join(KINDS)} |\n|---|{'---|' * len(KINDS)}\n"


def update_table(file: Path, names: tuple[str, ...]) -> None:
    """Look at networks and put their rows into the table of a Markdown file, in order of names.

    The file is written after each network. Whatever stands before the table stays.
    """
    text = file.read_text(encoding="utf-8") if file.is_file() else HEADER
    before, header, table = text.partition(HEADER)
    if not header:
        raise SystemExit(f"{file} has no table that begins with {HEADER.splitlines()[0]}")
    rows = {line.split("`")[1]: line for line in table.splitlines() if line.startswith("| `")}
    for name in names or tuple(models.list_models(module=models)):
        cells = " | ".join(_cell(_trial(name, kind)) for kind in KINDS)
        rows[name] = f"| `{name}` | {cells} |"
        lines = "\n".join(rows[key] for key in sorted(rows))
        file.write_text(f"{before}{header}{lines}\n", encoding="utf-8")


def _cell(trial: Trial) -> str:
    if trial.refused:
        # The row says which network it is.
        return trial.refused.removeprefix(Classifier.__name__).lstrip(": ").replace("|", "/")
    counts = f"{trial.removable:,} of {trial.groups:,}"
    if trial.difference is None:
        return f"{counts}: all stay zeroed"
    miss = "" if trial.difference <= GOAL else " MISS"
    return f"{counts}: {trial.difference:.1e}{miss}"


if __name__ == "__main__":
    torch.set_num_threads(1)
    update_table(Path(sys.argv[1]), tuple(sys.argv[2:]))
