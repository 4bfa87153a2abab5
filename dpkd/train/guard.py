"""A word of warning when preference training runs away: both responses of a pair become less and less likely.

The margin of a preference loss grows just as well when log q(y_s) falls without bound and drags log q(y_t) with it. A
re-run of sequence-level DPKD without a likelihood term ended so, at Rouge-L 6.4 (DistiLLM-2, Table 12).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dpkd.api import Callback, Training

# Nats per token below the best value so far: e times less likely, token for token. Runs that collapsed fell by 4 to 40
# (docs/results.md) and were noticed within 40 steps; those that held stayed within 1, or had y_s above y_t.
FALL = 1.0
TIMES = 3  # logged steps in a row


@dataclass
class RunawayGuard(Callback):
    """Watches the log-probs per token of chosen and rejected responses on logged steps; speaks once."""

    best: float | None = None
    _seen: int = 0
    _said: bool = False

    def on_log(self, training: Training, step: int, line: Mapping[str, Any]) -> None:
        if word := self.look(line):
            training.say(f"warning, step {step}: {word}")

    def look(self, metrics: Mapping[str, float]) -> str | None:
        """What to say, if anything. Numbers are nats per token."""
        names = ("logp/chosen", "length/chosen", "logp/rejected", "length/rejected")
        if self._said or any(name not in metrics for name in names):
            return None
        logp_t, length_t, logp_s, length_s = (metrics[name] for name in names)
        chosen, rejected = logp_t / max(1.0, length_t), logp_s / max(1.0, length_s)
        self.best = chosen if self.best is None else max(self.best, chosen)
        runs_away = chosen < self.best - FALL and rejected < chosen
        self._seen = self._seen + 1 if runs_away else 0
        if self._seen < TIMES:
            return None
        self._said = True
        return (
            f"log q of the chosen responses has fallen from {self.best:.2f} to {chosen:.2f} nats per token, and "
            f"that of the rejected ones to {rejected:.2f}: the preference pushes the student away from both. A "
            "likelihood term holds it (terms.lm.weight=1); so do a smaller loss.beta and a lower train.lr."
        )
