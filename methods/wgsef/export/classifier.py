"""Removal for image classifiers: a smaller network whose config rebuilds it."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from bench.models.vision import Classifier
from methods.wgsef.export.removal import remove
from methods.wgsef.groups.family import Family


def smaller_classifier(
    network: Classifier, families: Sequence[Family], dead: Sequence[Tensor], multiple: int = 1
) -> Classifier:
    """Return the classifier without its dead groups; `bench.models.vision.save` can write it.

    Raises:
        UserError: the groups cannot be removed; see `removal.remove`.
    """
    removal = remove(network, families, dead, multiple)
    smaller = removal.network
    assert isinstance(smaller, Classifier)
    config = network.config
    # The network may have been pruned before: earlier shapes hold where this removal changed
    # nothing, and shapes inside branches that are gone now would refer to modules that do not
    # exist.
    cut = {**config.shapes, **removal.shapes}
    gone = (*config.removed, *removal.branches)
    shapes = {n: s for n, s in cut.items() if not any(n.startswith(f"{b}.") for b in gone)}
    smaller.config = config.model_copy(update={"shapes": shapes, "removed": gone})
    return smaller
