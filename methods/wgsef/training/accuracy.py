"""Top-1 accuracy of a classifier.

Shapes: B images, C channels, H height and width, K classes.
"""

from __future__ import annotations

import torch
from torch import nn

from bench.data.images import ImageSet
from bench.data.images.batches import in_order

_BATCH = 256


@torch.no_grad()
def accuracy(network: nn.Module, images: ImageSet) -> float:
    """Return the fraction of images whose highest logit is that of their label."""
    device = next(network.parameters()).device
    # Called between epochs of a training: the mode must be as it was, or BatchNorm would stop
    # updating.
    training = network.training
    network.eval()
    right = 0
    for image_BCHH, label_B in in_order(images, _BATCH):
        logit_BK = network(image_BCHH.to(device))
        right += int((logit_BK.argmax(-1).cpu() == label_B).sum())
    network.train(training)
    return right / len(images)
