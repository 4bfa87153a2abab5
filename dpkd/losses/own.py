"""A plain function as a loss: what it reads are its arguments, its settings are those with a default."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from pydantic import create_model
from torch import Tensor

from dpkd.api import Card, LossConfig, LossSpec, PairInputs, PairLoss, Signal, TokenInputs, TokenLoss
from dpkd.api.inputs import TOKEN_LOGPS
from dpkd.errors import DpkdError

TOKEN = frozenset({Signal.STUDENT_LOGITS, Signal.TEACHER_LOGITS, Signal.TARGETS, Signal.BY_STUDENT})
PAIR = frozenset({Signal.LENGTHS, *TOKEN_LOGPS, *TOKEN_LOGPS.values()})


def as_spec(loss: LossSpec | Callable[..., Tensor]) -> LossSpec:
    """The spec of a loss that is one, or a function."""
    return loss if isinstance(loss, LossSpec) else spec_of(loss)


def spec_of(function: Callable[..., Tensor]) -> LossSpec:
    """The loss that a function computes: a value for each token `[N]`, or for each pair `[B]`.

    Arguments without a default are what it reads: for tokens student_logits and teacher_logits `[N, V]`, targets `[N]`,
    by_student `[N]`; for pairs student_logps, teacher_logps, reference_logps and lengths, each a `Pair` of `[B]`,
    and student_token_logps, teacher_token_logps and reference_token_logps, each a `Pair` of `[B, T]`.
    Arguments with a default are its settings. Raises DpkdError for arguments of other names.
    """
    parameters = inspect.signature(function).parameters.values()
    names = [p.name for p in parameters if p.default is p.empty]
    settings = {p.name: (_type(p), p.default) for p in parameters if p.default is not p.empty}
    known = {str(signal): signal for signal in TOKEN | PAIR}
    if not names or any(name not in known for name in names):
        other = next((name for name in names if name not in known), None)
        raise DpkdError(
            f"loss: the function {function.__name__} "
            + (f"has an argument {other!r}" if other else "reads nothing")
            + f"; expected {', '.join(sorted(TOKEN))} for a loss on tokens, or {', '.join(sorted(PAIR))} for one on "
            "pairs, and defaults for its settings"
        )
    reads = frozenset(known[name] for name in names)
    if reads & TOKEN and reads & PAIR:
        raise DpkdError(f"loss: the function {function.__name__} reads tokens and pairs: {', '.join(names)}")
    title = function.__name__.strip("<>_").replace("_", "-")
    config: Any = create_model("Settings", __base__=LossConfig, **settings)  # type: ignore[call-overload]
    return LossSpec(
        name=title,
        loss=_on_pairs(function, names) if reads & PAIR else _on_tokens(function, names),
        config=config,
        card=Card(title, _first_line(function), "", (), "", ""),
        reads=reads,
    )


def _type(parameter: inspect.Parameter) -> Any:
    return type(parameter.default) if parameter.default is not None else Any


def _first_line(function: Callable[..., Tensor]) -> str:
    return (inspect.getdoc(function) or f"The function {function.__name__} of a Python program.").splitlines()[0]


def _on_tokens(function: Callable[..., Tensor], names: list[str]) -> type[TokenLoss[Any]]:
    class FunctionLoss(TokenLoss[Any]):
        """The function, on tokens."""

        def forward(self, x: TokenInputs) -> Tensor:
            return function(**{name: getattr(x, name) for name in names}, **self.config.model_dump())

    return FunctionLoss


def _on_pairs(function: Callable[..., Tensor], names: list[str]) -> type[PairLoss[Any]]:
    class FunctionLoss(PairLoss[Any]):
        """The function, on pairs."""

        def forward(self, x: PairInputs) -> Tensor:
            return function(**{name: x[Signal(name)] for name in names}, **self.config.model_dump())

    return FunctionLoss
