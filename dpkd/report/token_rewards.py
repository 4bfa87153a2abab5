"""The implicit reward of every token of an answer: where the student departs from its teacher, and to which side.

r̂_t = β · log q(y_t | x, y_<t) / p(y_t | x, y_<t) (DPKD, §4.3, by token); β is the loss's own, or 1. Their sum over an
answer is the implicit reward of the whole.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dpkd.errors import DpkdError
from dpkd.io import write_json
from dpkd.report.reading import Run, Scored
from dpkd.report.texts import teacher_of

if TYPE_CHECKING:
    from dpkd.api.teachers import Teacher
    from dpkd.data.batches import TokenSequence

FILE = "token_rewards.json"


@dataclass(frozen=True)
class Answer:
    """A text to look at; `ids` are its tokens where the file has them, EOS included."""

    prompt: str
    writer: str
    text: str
    ids: tuple[int, ...] = ()


def write_token_rewards(run: Run, count: int, *, trust_remote_code: bool = False) -> Path:
    """Load teacher and student of a finished run and write RUN/token_rewards.json for `count` of its prompts.

    Raises DpkdError when the run has no teacher, no model yet, or no answer to look at.
    """
    from dpkd.evaluation.target import find_target

    answers = answers_of(run, count)
    target = find_target(str(run.path), None, trust_remote_code=trust_remote_code)
    if target.teacher is None or target.teacher.model is None:
        raise DpkdError(f"--token-rewards: {run.path} was trained without a teacher; there is no reward to show")
    rows = _rewards(target.model, target.teacher, answers, run.config)
    return write_json(run.path / FILE, rows)


def answers_of(run: Run, count: int) -> list[Answer]:
    """Answers to the first `count` prompts of the first evaluation, else of the last step in samples.jsonl.

    Raises DpkdError when there are none.
    """
    answers = [
        answer
        for scored in [one for one in run.evaluations.values() if not one.is_benchmark][:1]
        for answer in _evaluated(scored, count)
    ] or _sampled(run, count)
    if not answers:
        raise DpkdError(
            f"--token-rewards: {run.path} has no answers to look at; write some with "
            f"`dpkd eval --model {run.path} --data FILE`"
        )
    return answers


def _evaluated(scored: Scored, count: int) -> list[Answer]:
    own = next(iter(scored.predictions().values()), [])[:count]
    teachers = next(iter(teacher_of(scored).predictions().values()), [])
    by_id = {row.get("id"): row for row in teachers}
    answers = []
    for row in own:
        pairs = [("student", row)] + ([("teacher", by_id[row.get("id")])] if row.get("id") in by_id else [])
        answers += [
            Answer(str(r.get("prompt", "")), writer, str(r.get("prediction", "")), tuple(r.get("ids", ())))
            for writer, r in pairs
        ]
    return answers


def _sampled(run: Run, count: int) -> list[Answer]:
    last = max((row["step"] for row in run.samples), default=None)
    rows = [row for row in run.samples if row.get("step") == last][:count]
    return [
        Answer(str(row.get("prompt", "")), str(r.get("writer", "")), str(r.get("text", "")))
        for row in rows
        for r in row.get("responses", [])
    ]


def _rewards(student: Any, teacher: Any, answers: Sequence[Answer], config: Mapping[str, Any]) -> list[dict[str, Any]]:
    from dpkd.evaluation.evaluator import Evaluator

    evaluator = Evaluator(student, teacher)
    if evaluator.teacher is None:
        raise DpkdError(f"--token-rewards: {evaluator.note}")
    sequences = [
        _sequence(answer, evaluator.tokenizer, config.get("data", {}).get("template", "auto")) for answer in answers
    ]
    found = token_rewards(
        evaluator.model,
        evaluator.teacher,
        sequences,
        vocabulary=evaluator.vocabulary,
        pad_id=evaluator.tokenizer.pad_token_id,
        beta=_reward_scale(config),
    )
    return [
        {"prompt": answer.prompt, "writer": answer.writer, "tokens": _tokens(sequence, values, evaluator.tokenizer)}
        for answer, sequence, values in zip(answers, sequences, found, strict=True)
    ]


def _reward_scale(config: Mapping[str, Any]) -> float:
    """β of the run's loss, as the loss says; 1 where that is not installed, or says nothing."""
    from dpkd.api import LossSpec
    from dpkd.plugins import load_registry

    own = dict(config.get("loss") or {})
    registered = load_registry().all(LossSpec).get(str(own.pop("name", "")))
    if registered is None or registered.spec.reward_scale is None:
        return 1.0
    return float(registered.spec.reward_scale(registered.spec.config.model_validate(own)))


def _sequence(answer: Answer, tokenizer: Any, template: str) -> TokenSequence:
    from dpkd.data.batches import TokenSequence
    from dpkd.data.encoding import encode, encode_continuations, prompt_prefix

    (prompt,) = encode(tokenizer, [answer.prompt], special=template != "alpaca")
    prefix = prompt_prefix(tokenizer)
    if template != "chat" and tuple(prompt[: len(prefix)]) != prefix:
        prompt = [*prefix, *prompt]
    ids = answer.ids or tuple(encode_continuations(tokenizer, [answer.text])[0])
    return TokenSequence(prompt, ids)


def _tokens(sequence: TokenSequence, rewards: Sequence[float], tokenizer: Any) -> list[dict[str, Any]]:
    """The text of each token as it continues those before it; a character of several tokens shows at its last one."""
    from dpkd.data.encoding import continuation

    rows: list[dict[str, Any]] = []
    told = ""
    for end, reward in enumerate(rewards, start=1):
        text = continuation(tokenizer, sequence.prompt_ids, sequence.response_ids[:end], special=True)
        cut = text.endswith("\ufffd")
        rows.append({"text": "" if cut else text[len(told) :], "reward": reward})
        told = told if cut else text
    return rows


def token_rewards(
    student: Any,
    teacher: Teacher,
    sequences: Sequence[TokenSequence],
    *,
    vocabulary: int,
    pad_id: int,
    beta: float = 1.0,
) -> list[list[float]]:
    """`β · (log q - log p)` in nats of each response token of each sequence, at temperature 1, in eval mode."""
    import torch

    from dpkd.api.teachers import Wants
    from dpkd.data.batches import collate
    from dpkd.models.chunked import chunk_rows, token_logps
    from dpkd.models.head import evaluating, head_of, hidden_rows

    device = next(student.parameters()).device
    rows = chunk_rows(vocabulary, device=device)
    results = []
    with torch.no_grad(), evaluating(student):
        for sequence in sequences:  # a handful, one by one: no row is padded
            batch = collate([sequence], pad_id=pad_id).to(device)
            logq_N = token_logps(hidden_rows(student, batch), head_of(student, vocabulary), batch.targets, rows)
            logp_N = teacher.score(batch, Wants(rows, logps=True)).logps()
            results.append([float(value) for value in beta * (logq_N.double() - logp_N.double()).cpu()])
    return results
