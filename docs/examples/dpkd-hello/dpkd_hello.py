"""Total variation distance between teacher and student at every position."""

from dpkd.api import Card, LossConfig, LossSpec, Signal, Source, TokenLoss, Trait, hookimpl, setting


class HelloConfig(LossConfig):
    """How a gap counts."""

    power: float = setting(1.0, description="exponent of the gap", source="made up for this example", ge=1, le=2)


class HelloLoss(TokenLoss[HelloConfig]):
    """`½ Σ |p - q|^power`: one value per response position, [N]."""

    def forward(self, x):
        p, q = x.teacher_log_probs().exp(), x.student_log_probs().exp()
        return 0.5 * (p - q).abs().pow(self.config.power).sum(-1)


SPEC = LossSpec(
    name="hello",
    loss=HelloLoss,
    config=HelloConfig,
    card=Card(
        title="Total variation distance",
        summary="Half the sum of the gaps between two distributions.",
        formula="½ Σᵥ |p(v) - q(v)|^power",
        sources=(Source("f-divergence distillation", "https://arxiv.org/abs/2307.15190", "§2"),),
        use_when="You are learning how a loss is written.",
        avoid_when="You want the best student: its gradient vanishes where q is small.",
    ),
    reads=frozenset({Signal.STUDENT_LOGITS, Signal.TEACHER_LOGITS}),
    traits=frozenset({Trait.ZERO_AT_MATCH, Trait.NON_NEGATIVE, Trait.SHIFT_INVARIANT}),
)


@hookimpl
def dpkd_losses():
    return [SPEC]
