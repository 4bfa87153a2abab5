"""Generalized knowledge distillation (Agarwal et al., 2306.13649): `jsd`, half of the time on the student's own text.

With probability λ a step trains on responses that the student has just sampled, otherwise on the data set. No gradient
flows through the sampling.
"""

from __future__ import annotations

from dpkd.api import Card, LossSpec, hookimpl, preset
from dpkd_zoo import jsd
from dpkd_zoo.papers import GKD, TRL, at

SPEC = preset(
    jsd.SPEC,
    name="gkd",
    card=Card(
        title="Generalized knowledge distillation",
        summary="Generalized JSD on responses from the student and the data set in turn.",
        formula="(1-λ)·E_{y~data}[D(p‖q)] + λ·E_{y~q}[D(p‖q)],  D = β·KL(p‖m) + (1-β)·KL(q‖m),  m = β·p + (1-β)·q",
        sources=(at(GKD, "§3: λ, β and the JSD; Table A.1: training settings"), at(TRL, "GKDTrainer")),
        use_when="The student already writes sensible text (start from SFT) and will be used to generate: it learns "
        "from its own mistakes.",
        avoid_when="Sampling is too slow, or the student's text is still nonsense: jsd is the same objective on given "
        "text.",
        notes="λ is text.mix.student (0.5 here, as in TRL; the paper also reports 0 and 1), drawn once per step. At β "
        "= 0 and 1 the loss is the KL itself, as in TRL (see jsd). TRL samples at temperature 0.9 "
        "(text.sampling.temperature) up to 128 new tokens, with dropout off. The loss itself takes about 2.6 times "
        "kd's time; sampling the student's responses costs far more.",
        latex=r"(1-\lambda)\,\mathbb{E}_{y\sim\mathrm{data}}\,[D_\beta(p\,\|\,q)]+ \lambda\,\mathbb{E}_{y\sim q}"
        r"\,[D_\beta(p\,\|\,q)]",
    ),
    suggests={"text": {"source": "mixed", "mix": {"dataset": 0.5, "student": 0.5}}},
)


@hookimpl
def dpkd_losses() -> list[LossSpec]:
    return [SPEC]
