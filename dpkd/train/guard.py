"""A word of warning when preference training runs away: both responses of a pair become less and less likely.

The margin of a preference loss grows just as well when log q(y_s) falls without bound and drags log q(y_t) with it. A
re-run of sequence-level DPKD without a likelihood term ended so, at Rouge-L 6.4 (DistiLLM-2, Table 12). Or the student
leaves its teacher while both stay about as likely: on pairs that are never written anew, at Rouge-L 2.3.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from dpkd.api import Callback, Training
from dpkd.run_metrics import CollapseDetector


@dataclass
class RunawayGuard(Callback):
    """Watches the log-probs per token of both responses, and the reverse KL, on logged steps; speaks once."""

    detector: CollapseDetector = field(default_factory=CollapseDetector)
    _said: bool = False

    def on_log(self, training: Training, step: int, line: Mapping[str, Any]) -> None:
        if word := self.look(line):
            training.say(f"warning, step {step}: {word}")

    def look(self, metrics: Mapping[str, float]) -> str | None:
        """What to say, if anything. Numbers are nats per token."""
        found = None if self._said else self.detector.see(metrics)
        if found is None:
            return None
        self._said = True
        if found.what == "divergence":
            return (
                f"the reverse KL to the teacher has risen from {found.best:.2f} to {found.now:.2f} nats per token: the "
                "preference pushes the student away from what the teacher writes. New pairs hold it "
                "(text.refresh=every_step), and so does a likelihood term (terms.lm.weight=1)."
            )
        return (
            f"log q of the chosen responses has fallen from {found.best:.2f} to {found.now:.2f} nats per token, "
            f"and that of the rejected ones even further: the preference pushes the student away from both. A "
            "likelihood term holds it (terms.lm.weight=1), and so do new pairs (text.refresh=every_step); a smaller "
            "loss.beta or train.clip does not."
        )
