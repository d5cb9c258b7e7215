"""Which scoring backend was used, and why; stored in the record."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

Engine = Literal["shared", "plain"]
SPENT = ("tokens_per_batch", "halved", "given", "computed")
"""Fields that depend on free memory and on what an interrupted attempt had already answered."""


@dataclass
class Asked:
    """The requested backend, the one used, and the `reasons` if they differ.

    `tokens_per_batch` is the token budget of the prefix-sharing backend as first estimated,
    `halved` the number of times memory then ran out. `computed` is the number of tokens that went
    through the network, `given` the number that the padded backend would have sent.
    """

    wanted: Engine
    used: Engine = "plain"
    reasons: list[str] = field(default_factory=list)
    tokens_per_batch: int | None = None
    halved: int = 0
    given: int = 0
    computed: int = 0

    def because(self, reason: str) -> None:
        """Add a reason, unless it is already listed."""
        if reason not in self.reasons:
            self.reasons.append(reason)

    def plain(self) -> dict[str, Any]:
        """Return JSON values, with the fields of this attempt alone nested under `spent`."""
        values = asdict(self)
        # The remaining fields are equal whenever a run is repeated or resumed; these are not, so
        # they are kept apart.
        spent = {name: values.pop(name) for name in SPENT}
        return {**values, "spent": spent}
