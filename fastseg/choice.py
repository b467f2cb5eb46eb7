"""What fastseg chooses for its user, and why."""

import dataclasses
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Choice:
    """A value, the reason in words, and the figures behind it; prints as "value: why"."""

    value: str
    why: str
    facts: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.value}: {self.why}"

    def as_dict(self) -> dict[str, Any]:
        """Plain values, as a log has them."""
        return dataclasses.asdict(self)
