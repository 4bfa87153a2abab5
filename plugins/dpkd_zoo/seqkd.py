"""Sequence-level knowledge distillation: `kd` without its KL term, on responses that the teacher wrote.

Kim & Rush (2016) train on the teacher's beam-search mode; MiniLLM's and DPKD's baselines on one sample per prompt.
"""

from __future__ import annotations

from dpkd.api import Card, LossSpec, Text, hookimpl, preset, setting
from dpkd_zoo import kd
from dpkd_zoo.papers import LMOPS, SEQKD, at


class SeqKDConfig(kd.KDConfig):
    """`kd`'s settings, with a share of the KL term that may be 0."""

    kd_ratio: float = setting(
        0.0,
        description="share of word-level forward KL; the rest is cross-entropy on the response",
        source="Kim & Rush: 0 (LMOps' seqkd_base.sh passes --kd-ratio 0.5)",
        ge=0,
        le=1,
    )


SPEC = preset(
    kd.SPEC,
    name="seqkd",
    config=SeqKDConfig,
    card=Card(
        title="Sequence-level knowledge distillation",
        summary="Cross-entropy on responses written by the teacher.",
        formula="-log q(yᵢ | y₍<ᵢ₎, x),  y ~ p(·|x)",
        sources=(at(SEQKD, "§3.2"), at(LMOPS, "scripts/gpt2/seqkd, scripts/gpt2/tools/generate_data_seqkd.sh")),
        use_when="The teacher can be sampled but not scored (another tokenizer, an API), or must run only once.",
        avoid_when="Its logits are available: word-level losses learn more from the same text.",
        notes="The teacher's text is sampled at T = 1, top-p 1, once per prompt, and stored. Kim & Rush train on its "
        "mode: text.teacher_sampling.temperature=0 was 4.9 Rouge-L better in this project's experiment, and repeated "
        'itself (docs/results.md, "Cooler text, on a GPU"). If the teacher\'s '
        "responses are already in your data (a closed model's, say), no teacher is needed: text.source=dataset. The "
        "released `seqkd` scripts still pass --kd-ratio 0.5: kd_ratio=0.5 reproduces them.",
        latex=r"-\log q(y_i \mid y_{<i}, x), \qquad y \sim p(\cdot \mid x)",
    ),
    accepts=frozenset({Text.TEACHER, Text.DATASET}),
    suggests={"text": {"source": "teacher"}},
)


@hookimpl
def dpkd_losses() -> list[LossSpec]:
    return [SPEC]
