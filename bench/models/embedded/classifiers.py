"""Recipe of the small image classifiers: ``python -m bench.models.embedded.classifiers --out DIR``.

All are trained alike on scikit-learn's digits: SGD with momentum on the 1,200 training images, each
shifted by up to one pixel. The test images are scored only once, at the end, and do not affect any
choice. Every folder has config.json, model.safetensors and the log ``training.json``.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from bench.data.image_catalogue import load_image_set
from bench.data.image_sets import ImageSet, Splits, training_batches
from bench.models.classifiers.architectures import build_classifier
from bench.models.classifiers.classifier import Classifier, VisionConfig
from bench.models.classifiers.serialization import save_classifier
from bench.models.embedded.training import (
    StepLimits,
    one_cycle,
    optimizer_steps,
    training_log,
    write_training_log,
)

NAMES = ("micro_resnet", "micro_vgg", "micro_lenet", "micro_mobilenet")


@dataclass(frozen=True)
class ClassifierRecipe:
    """Everything that determines the result besides the images."""

    seed: int = 7
    epochs: int = 30
    batch: int = 64
    learning_rate: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 5e-4
    warmup_share: float = 0.1


def train(name: str, splits: Splits, settings: ClassifierRecipe) -> tuple[Classifier, list[float]]:
    """Train a network; return it in evaluation mode, with the mean loss of every epoch."""
    torch.manual_seed(settings.seed)
    network = build_classifier(
        VisionConfig(architecture=name, channels=splits.channels, size=splits.size)
    )
    optimizer = torch.optim.SGD(
        network.parameters(),
        settings.learning_rate,
        settings.momentum,
        weight_decay=settings.weight_decay,
    )
    # LeNet has no BatchNorm, without which the others' learning rate is too high.
    rate = settings.learning_rate * (0.5 if "lenet" in name else 1.0)
    per_epoch = len(splits.train) // settings.batch
    limits = StepLimits(settings.epochs * per_epoch)
    schedule = one_cycle(optimizer, rate, limits.steps, settings.warmup_share)
    batches = chain.from_iterable(
        # Shuffling and shifts depend only on seed and epoch instead of a global generator.
        training_batches(splits.train, settings.batch, seed=settings.seed, epoch=epoch)
        for epoch in range(settings.epochs)
    )
    curve, losses = [], list[float]()
    for step in optimizer_steps(network, optimizer, schedule, limits):
        image_BCHH, label_B = next(batches)
        loss = cross_entropy(network(image_BCHH), label_B)
        loss.backward()
        losses.append(float(loss.detach()))
        if step.number % per_epoch == 0:
            curve.append(round(sum(losses) / len(losses), 4))
            losses.clear()
    return network.eval(), curve


@torch.no_grad()
def classifier_accuracy(network: nn.Module, images: ImageSet) -> float:
    """Return the fraction of images that are classified correctly."""
    image_BCHH, label_B = images.fetch(torch.arange(len(images)), None)
    return float((network(image_BCHH).argmax(-1) == label_B).double().mean())


def train_and_save(name: str, folder: Path, settings: ClassifierRecipe) -> None:
    """Train one network and write its folder."""
    # A single thread, so that the order of summation, and with it the weights, do not depend on the
    # number of cores.
    torch.set_num_threads(1)
    splits = load_image_set("digits")
    began = time.perf_counter()
    network, curve = train(name, splits, settings)
    save_classifier(network, folder)
    log = training_log(settings, network, time.perf_counter() - began, ["torch"])
    log["data"] = {
        "name": splits.name,
        "split": splits.provenance,
        "train": splits.train.fingerprint(),
        "test": splits.test.fingerprint(),
    }
    log["results"] = {
        "train_accuracy": round(classifier_accuracy(network, splits.train), 4),
        "test_accuracy": round(classifier_accuracy(network, splits.test), 4),
        "test_images": len(splits.test),
    }
    write_training_log(folder, log | {"loss": curve})
    print(f"{name}: {log['results']}, {log['seconds']} s")


def main() -> None:
    """Train the networks named on the command line, all of them by default."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(NAMES))
    parser.add_argument("--out", type=Path, required=True, help="parent of the networks' folders")
    given = parser.parse_args()
    for name in given.names or NAMES:
        train_and_save(name, given.out / name, ClassifierRecipe())


if __name__ == "__main__":
    main()
