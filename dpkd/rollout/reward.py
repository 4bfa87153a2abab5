"""Rewards of sampled responses: any metric that scores rows, the same that `dpkd eval` reports afterwards."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from dpkd.api import Answers, MetricSpec, Response
from dpkd.data.encode import Prompt
from dpkd.errors import DpkdError, described


def why_no_reward(metric: MetricSpec) -> str | None:
    """Why a metric cannot be a reward; None when it can."""
    if metric.per_row is None:
        return f"{metric.name} gives no value for each response"
    if metric.better != "higher":
        return (
            f"a reward is higher for better responses, and {metric.name} says `better` is {metric.better or 'neither'}"
        )
    return None


@dataclass(frozen=True)
class Reward:
    """Scores responses to prompts with a metric."""

    metric: MetricSpec
    prompts: Sequence[Prompt]

    def __call__(self, indices: Sequence[int], responses: Sequence[Response], texts: Sequence[str]) -> list[float]:
        """One number for each response; `indices` are the examples that they answer, `texts` the responses as text.

        Raises DpkdError when the metric fails, or gives a response no finite number.
        """
        asked = [self.prompts[i] for i in indices]
        answers = Answers(
            [text.strip() for text in texts],
            [prompt.references for prompt in asked],
            [len(response.ids) for response in responses],
            [response.truncated for response in responses],
            [prompt.text for prompt in asked],
        )
        assert self.metric.per_row is not None  # the settings are refused before
        try:
            values = list(self.metric.per_row(answers))
        except Exception as error:  # a plugin's code
            bare = sum(not prompt.references for prompt in asked)
            hint = f" ({bare} of these rows have no reference)" if bare else ""
            raise DpkdError(f"the reward {self.metric.name} failed: {described(error)}{hint}") from error
        if len(values) != len(asked):
            raise DpkdError(f"the reward {self.metric.name} gave {len(values)} values for {len(asked)} responses")
        for prompt, value in zip(asked, values, strict=True):
            if value is None or not math.isfinite(value):
                raise DpkdError(
                    f"the reward {self.metric.name} gave a response to {prompt.id} the value {value}; expected a "
                    "finite number"
                )
        return [float(value) for value in values if value is not None]
