"""Speculative knowledge distillation (Xu et al., 2410.11325): a divergence on text that both models write together.

The student proposes each token; a proposal outside the teacher's K likeliest tokens is replaced by a draw from the
teacher. At first most tokens are the teacher's, later the student's own. The objective is that of `jsd`; what makes it
SKD is the text (`text.teacher_veto`).
"""

from __future__ import annotations

import warnings
from typing import Any

from pydantic import model_validator

from dpkd.api import Card, LossSpec, hookimpl, preset
from dpkd_zoo import jsd
from dpkd_zoo.papers import SPECULATIVE_KD, at

DIVERGENCES = {"fkl": 0.0, "jsd": 0.5, "rkl": 1.0}  # the values of β that `divergence` was, before 0.2


class SpeculativeKDConfig(jsd.JSDConfig):
    """The divergence, by its β; K is `text.teacher_veto`."""

    @model_validator(mode="before")
    @classmethod
    def _divergence_is_beta(cls, values: Any) -> Any:
        if not isinstance(values, dict) or values.get("divergence") not in DIVERGENCES:
            return values
        beta = DIVERGENCES[values["divergence"]]
        warnings.warn(f"loss.divergence={values['divergence']} is now loss.beta={beta:g}", FutureWarning, stacklevel=2)
        return {"beta": beta, **{key: value for key, value in values.items() if key != "divergence"}}


SPEC = preset(
    jsd.SPEC,
    name="speculative-kd",
    config=SpeculativeKDConfig,
    defaults={"beta": (0.0, "forward KL: `kl` in the released kd_train.yaml (Algorithm 1 leaves D open)")},
    card=Card(
        title="Speculative knowledge distillation",
        summary="A divergence on text that the student proposes and the teacher corrects token by token.",
        formula="E_{y~π}[D(p‖q)],  π(v) = q(v)·[v ∈ top-K of p] + p(v)·Σ_{u ∉ top-K of p} q(u)",
        sources=(at(SPECULATIVE_KD, "Algorithm 1; google-research/speculative_kd, config/kd_train.yaml: K = 25"),),
        use_when="The student is too weak for its own text, which the teacher would score as noise, but should still "
        "learn from its own mistakes: gkd, or rkl on student text, start badly there.",
        avoid_when="Sampling with both models at every step is too slow; or the student already writes like the "
        "teacher, in which case the text is the student's own anyway.",
        notes="β = 0 is forward KL, 1 reverse KL, 0.5 the Jensen-Shannon divergence, as in jsd. K is "
        "text.teacher_veto: 0 is on-policy distillation, 1 nearly the teacher's greedy text. The paper drafts a few "
        "tokens and has the teacher check them at once, which gives the same distribution; here both models write "
        "token by token, and π is sampled in closed form. What differs from the released code: its two samplers have "
        "settings of their own (student: temperature 0.5, top-p 0.5; teacher: temperature 0.2, top-p 0.5), while "
        "text.sampling filters both models here (temperature 1 by default); and its `jsd` is ½·[KL(m‖p) + KL(m‖q)], "
        "the KLs from the mixture, where the Jensen-Shannon divergence has the KLs to it. The teacher runs for every "
        "sampled token.",
        latex=r"\mathbb{E}_{y\sim\pi}\,[D_\beta(p\,\|\,q)], \qquad \pi(v) = q(v)\,[v\in\mathrm{top}_K(p)] + "
        r"p(v)\sum_{u\notin\mathrm{top}_K(p)} q(u)",
    ),
    suggests={"text": {"source": "student", "teacher_veto": 25}},
)


@hookimpl
def dpkd_losses() -> list[LossSpec]:
    return [SPEC]
