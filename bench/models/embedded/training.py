"""AdamW for the small language models, without decay on gains and biases."""

from torch import nn, optim


def adamw(model: nn.Module, learning_rate: float, weight_decay: float) -> optim.AdamW:
    """Return AdamW over the trainable weights, with decay on matrices only."""
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    # Decay pulls gains towards 0, not towards the 1 at which they are neutral.
    groups = [
        {"params": [w for w in trained if w.ndim >= 2], "weight_decay": weight_decay},
        {"params": [w for w in trained if w.ndim < 2], "weight_decay": 0.0},
    ]
    return optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.98))
