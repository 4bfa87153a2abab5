"""RLOO with a teacher: reward less the KL to the teacher, against the mean of the other responses."""

from dpkd.api import (
    Answers,
    Card,
    LossConfig,
    LossSpec,
    MetricSpec,
    RolloutLoss,
    Signal,
    Source,
    Text,
    hookimpl,
    setting,
)
from dpkd.functional import leave_one_out, segment_sum


class LeaveOneOutConfig(LossConfig):
    """Price of leaving the teacher."""

    beta: float = setting(0.05, description="β: reward that a nat of log q/p costs", source="made up here", ge=0)


class LeaveOneOutLoss(RolloutLoss[LeaveOneOutConfig]):
    """`-A q/q_drawn`, `A = R - mean of the other R of the prompt`, `R = r - β Σ log q/p`: one value per token, [N]."""

    def advantages(self, rollout):
        gap_R = segment_sum(rollout.rollout_logps - rollout.teacher_logps, rollout.sequence, len(rollout.prompt))
        advantage_R = leave_one_out(rollout.rewards - self.config.beta * gap_R, rollout.prompt)
        return advantage_R[rollout.sequence]

    def forward(self, x):
        # e^20 is far above any useful ratio: the bound only prevents an overflow.
        ratio = (x.student_logps() - x.behaviour_logps).clamp(max=20.0).exp()
        return -x.part("advantage", x.advantages) * ratio


LOSS = LossSpec(
    name="leave-one-out",
    loss=LeaveOneOutLoss,
    config=LeaveOneOutConfig,
    card=Card(
        title="REINFORCE leave-one-out",
        summary="Policy gradient of a reward less the KL to the teacher; the baseline is the prompt's other responses.",
        formula="-Aᵢ·q(yₜ)/q_drawn(yₜ),  Aᵢ = Rᵢ - 1/(k-1)·Σ_{j≠i} Rⱼ,  R = r(x, y) - β·log(q(y|x)/p(y|x))",
        sources=(Source("Back to Basics", "https://arxiv.org/abs/2402.14740", "the RLOO estimator"),),
        use_when="You can compute how good a response is, and the teacher keeps the student fluent.",
        avoid_when="There is one response to a prompt: without siblings there is no baseline.",
    ),
    reads=frozenset({Signal.STUDENT_LOGITS, Signal.TARGETS, Signal.BEHAVIOUR_LOGPS, Signal.ADVANTAGES, Signal.REWARDS}),
    accepts=frozenset({Text.STUDENT}),
    suggests={
        "text": {"source": "student", "num_generations": 4},
        "student": {"dropout": "off"},
        "train": {"lr": 5e-6},
    },
)


def _brevity(answers: Answers) -> list[float]:
    """1 for an answer without words, less for every word, and 0 for one that did not end."""
    words = [len(text.split()) for text in answers.predictions]
    return [0.0 if cut else 1 / (1 + count) for count, cut in zip(words, answers.truncated, strict=True)]


REWARD = MetricSpec("brevity", "", "higher", "1 / (1 + words), 0 without EOS", per_row=_brevity)


@hookimpl
def dpkd_losses():
    return [LOSS]


@hookimpl
def dpkd_metrics():
    return [REWARD]
