"""Gram matrices of the inputs of linear layers, accumulated by hooks while a network runs.

Shapes: B rows, S tokens, T marked tokens, F inputs of a layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

from torch import Tensor, nn


@contextmanager
def gathering(
    modules: Sequence[nn.Module], marked_BS: Tensor, found: dict[nn.Module, Tensor]
) -> Iterator[None]:
    """Add ΦᵀΦ of the modules' inputs at the marked tokens to `found`, float64 [F, F].

    `found` accumulates over calls. The hooks exist only inside the `with` block.
    """

    def before(module: nn.Module, args: tuple[Any, ...]) -> None:
        # float64: a Gram matrix squares the condition number of Φ, and a least-squares solve
        # follows.
        phi_TF = args[0][marked_BS.to(args[0].device)].double()
        gram_FF = phi_TF.T @ phi_TF
        found[module] = found[module] + gram_FF if module in found else gram_FF

    hooks = [m.register_forward_pre_hook(cast(Callable[..., None], before)) for m in modules]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
