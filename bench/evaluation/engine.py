"""Which engine asked a model, and why: what a record keeps about how its numbers were had."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

Engine = Literal["shared", "plain"]
SPENT = ("tokens_per_batch", "halved", "given", "computed")
"""What depends on the memory that was free, and on what a killed attempt had answered already."""


@dataclass
class Asked:
    """What was wanted and what was used; `reasons` say why it was not always what was wanted.

    `tokens_per_batch` is the budget of the shared engine as it was found, `halved` how often
    memory then ran out. `computed` tokens went through the network where the plain engine would
    have sent `given`.
    """

    wanted: Engine
    used: Engine = "plain"
    reasons: list[str] = field(default_factory=list)
    tokens_per_batch: int | None = None
    halved: int = 0
    given: int = 0
    computed: int = 0

    def because(self, reason: str) -> None:
        """Keep a reason, once."""
        if reason not in self.reasons:
            self.reasons.append(reason)

    def plain(self) -> dict[str, Any]:
        """Return it as JSON values; what this attempt spent is apart, under `spent`."""
        values = asdict(self)
        spent = {name: values.pop(name) for name in SPENT}
        return {**values, "spent": spent}
