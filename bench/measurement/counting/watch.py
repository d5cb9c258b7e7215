"""Watching a call: its FLOPs by module, the part of them that masks hide, what has no formula."""

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
    """What was counted, filled in when the watch ends.

    `modules` maps a module's path to FLOPs by operator, `Global` to those of the whole call;
    `hidden` are the FLOPs of masked pairs, None where masks had no values; `attentions` is how
    often PyTorch's attention was called, whose masks alone are seen. `operators` are all that ran,
    `missed` the names of those that multiply and have no formula: the count is then short.
    """

    modules: dict[str, dict[Any, int]] = field(default_factory=dict)
    hidden: int | None = 0
    attentions: int = 0
    operators: frozenset[Any] = frozenset()
    missed: tuple[str, ...] = ()

    @property
    def total(self) -> int:
        """FLOPs of the whole call, masked pairs included."""
        return sum(self.modules.get("Global", {}).values())

    @property
    def causal(self) -> int | None:
        """FLOPs of the whole call without masked pairs."""
        return None if self.hidden is None else self.total - self.hidden

    def below(self, *leaves: str, within: tuple[str, ...] = ()) -> int:
        """Return the FLOPs of all modules with one of these names, none inside another of them.

        An item of a list has the list's name, which is never called itself. With `within`, only
        those inside modules of those names count.
        """
        names, found = set(leaves), 0
        for path, counts in self.modules.items():
            *above, own = path.split(".")
            if own.isdigit() and above:
                own = above.pop()
            if own in names and not names & set(above) and (not within or set(within) & set(above)):
                found += sum(counts.values())
        return found


class _Operators(TorchDispatchMode):
    """Notes every operator that runs; entered before the counter, it sees what the counter runs."""

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
    """Count what runs inside the block; the result is complete when the block ends."""
    counted, operators, hidden = Counted(), _Operators(), HiddenPairs()
    counter = FlopCounterMode(display=False, custom_mapping=formulas())
    with operators, counter, hidden:
        yield counted
    counted.modules = {path: dict(flops) for path, flops in counter.get_flop_counts().items()}
    counted.hidden = None if hidden.unknown else hidden.flops
    counted.attentions = hidden.calls
    counted.operators = frozenset(operators.seen)
    counted.missed = missed(operators.seen, counter.flop_registry)
