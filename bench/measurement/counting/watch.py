"""FLOP count of a call: by module, with the masked part and the operators without a formula."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from bench.measurement.counting.masks import HiddenPairs
from bench.measurement.counting.operators import formulas, missed


@dataclass
class Counted:
    """FLOPs of a call, filled in when the counting block ends.

    `modules` maps a module's path to FLOPs by operator, and `Global` to those of the whole call.
    `hidden` is the FLOPs of masked pairs, None if mask values were not available. `attentions` is
    the number of calls of PyTorch's attention, the only place where masks are observed. `operators`
    are all that ran; `missed` names the matmuls among them without a formula: if it is not empty,
    the count is too small.
    """

    modules: dict[str, dict[Any, int]] = field(default_factory=dict)
    hidden: int | None = 0
    attentions: int = 0
    operators: frozenset[Any] = frozenset()
    missed: tuple[str, ...] = ()

    @property
    def total(self) -> int:
        """FLOPs of the whole call, including masked pairs."""
        return sum(self.modules.get("Global", {}).values())

    @property
    def causal(self) -> int | None:
        """FLOPs of the whole call without masked pairs."""
        return None if self.hidden is None else self.total - self.hidden

    def below(self, *leaves: str, within: tuple[str, ...] = ()) -> int:
        """Return the FLOPs of all modules named in `leaves`, counting nested matches once.

        An item of a `ModuleList` takes the name of the list. With `within`, only modules inside
        modules of those names count.
        """
        names, found = set(leaves), 0
        for path, counts in self.modules.items():
            # A ModuleList is never called, so the counter knows its items (`list.3`) only.
            *above, own = path.split(".")
            if own.isdigit() and above:
                own = above.pop()
            # FLOPs of a module include those of its submodules: skip a match inside another match.
            if own in names and not names & set(above) and (not within or set(within) & set(above)):
                found += sum(counts.values())
        return found


class _Operators(TorchDispatchMode):
    """Records every operator that runs, including those that the FLOP counter decomposes into."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch does not say
        self.seen: set[Any] = set()

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        self.seen.add(getattr(func, "_overloadpacket", func))
        return func(*args, **(kwargs or {}))


@contextmanager
def watch() -> Iterator[Counted]:
    """Count the FLOPs of what runs inside the block; the result is complete when the block ends."""
    counted, operators, hidden = Counted(), _Operators(), HiddenPairs()
    counter = FlopCounterMode(display=False, custom_mapping=formulas())
    # Dispatch modes form a stack, and the one entered last sees an operator first. The recorder is
    # entered before the counter and so sees the operators that the counter passes on.
    with operators, counter, hidden:
        yield counted
    counted.modules = {path: dict(flops) for path, flops in counter.get_flop_counts().items()}
    counted.hidden = None if hidden.unknown else hidden.flops
    counted.attentions = hidden.calls
    counted.operators = frozenset(operators.seen)
    counted.missed = missed(operators.seen, counter.flop_registry)
