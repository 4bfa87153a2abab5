"""What a response is, whoever wrote it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from dpkd.api import Text


@dataclass(frozen=True)
class Response:
    """Token ids of a response (EOS included) and, if it was sampled for a policy gradient, what was known then.

    The tuples of log-probs (nats) and advantages have one entry per token.
    """

    ids: tuple[int, ...]
    writer: Text
    truncated: bool = False
    rollout_logps: tuple[float, ...] | None = None
    behaviour_logps: tuple[float, ...] | None = None
    teacher_logps: tuple[float, ...] | None = None
    advantages: tuple[float, ...] | None = None

    def is_empty(self, eos_ids: frozenset[int]) -> bool:
        """Whether nothing but EOS was written."""
        return all(token in eos_ids for token in self.ids)

    def as_dict(self) -> dict[str, Any]:
        """For JSON; what is None is left out."""
        return {key: value for key, value in asdict(self).items() if value is not None}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Response:
        """The inverse of `as_dict`."""
        as_tuples: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        return cls(**{**as_tuples, "writer": Text(values["writer"])})
