"""`text.reward`: a metric scores each sampled response, and the loss gets the numbers; docs/rewards.md."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from toy_runs import assert_same_model

import dpkd
from dpkd import losses
from dpkd.api import Answers, MetricSpec
from dpkd.errors import DpkdError, SettingsError
from dpkd.rollout.reward import Reward
from dpkd.run_metrics import read_metrics
from dpkd.testing import check_loss
from dpkd.train import run
from dpkd.train.build import assemble
from dpkd.train.progress import Display
from dpkd.train.resume import resume_folder

DOCS = Path(__file__).parents[2] / "docs"
EXAMPLE = (DOCS / "examples/dpkd-leave-one-out/dpkd_leave_one_out.py").read_text(encoding="utf-8")
*PIECES, FROM_PYTHON = re.findall(r"```python\n(.*?)```", (DOCS / "rewards.md").read_text(encoding="utf-8"), flags=re.S)
OWN = {"text.source": "student", "text.num_generations": 3, "text.reward": "letters"}
# The toys' responses are noise that never ends: distinct characters tell them apart.
LETTERS = """
from dpkd.api import MetricSpec, hookimpl

@hookimpl
def dpkd_metrics():
    count = lambda answers: [len(set(text)) for text in answers.predictions]
    return [MetricSpec("letters", "", "higher", "distinct characters", per_row=count)]
"""


@pytest.fixture
def example(install_plugin):
    """The names of the example, installed, and a reward."""
    install_plugin("stranger", {"leave-one-out": EXAMPLE, "metric.letters": LETTERS})
    names: dict[str, object] = {}
    exec(compile(EXAMPLE, "example", "exec"), names)
    return names


def test_every_block_of_the_page_is_a_piece_of_the_example():
    assert len(PIECES) == 2
    assert [piece for piece in PIECES if piece.strip() not in EXAMPLE] == []


def leave_one_out_by_hand(rewards, gaps, prompts, beta):
    """Response by response, in float64: R_i - 1/(k-1) Σ_{j≠i} R_j with R = r - β Σ log q/p."""
    returns = [r - beta * gap for r, gap in zip(rewards, gaps, strict=True)]
    found = []
    for i, prompt in enumerate(prompts):
        others = [returns[j] for j, other in enumerate(prompts) if other == prompt and j != i]
        found.append(returns[i] - np.mean(others))
    return found


def test_rewards_reach_the_loss_one_for_each_response(example, settings_of, quiet):
    resolved = settings_of("leave-one-out", {**OWN, "loss.beta": 0.3})
    parts = assemble(resolved, run._accelerator(resolved), Display(quiet))
    text = parts.builder.groups[0].source.next(0)
    every = [(index, response) for index, many in text.responses for response in many]
    assert len(every) == 12
    texts = [parts.run_data.tokenizer.decode(response.ids, skip_special_tokens=True) for _, response in every]
    rewards = [response.reward for _, response in every]
    assert rewards == [len(set(text.strip())) for text in texts]
    assert len(set(rewards)) > 1
    gaps = [float((r.rollout_logps.double() - r.teacher_logps.double()).sum()) for _, r in every]
    expected = leave_one_out_by_hand(rewards, gaps, [index for index, _ in every], 0.3)
    for (_, response), advantage in zip(every, expected, strict=True):
        assert response.advantages.tolist() == pytest.approx([advantage] * len(response.ids), abs=1e-5)
    assert text.counts["reward"] == pytest.approx(np.mean(rewards))


def test_the_same_in_a_loop_of_ones_own(example):
    """`dpkd.losses`: the advantages of given rewards; without them the loss says what is missing."""
    loss = losses.get(example["LOSS"], beta=0.5)
    labels = torch.tensor([[1, 2, -100], [1, 2, 3], [4, 1, -100], [4, 2, 2]])
    logps, teacher = -torch.rand(4, 3), -torch.rand(4, 3)
    known = {"labels": labels, "rollout_logps": logps, "teacher_logps": teacher, "prompt": torch.tensor([0, 0, 1, 1])}
    with pytest.raises(DpkdError, match="reads rewards, which are not given"):
        loss.advantages(**known)
    rewards = torch.tensor([1.0, 0.0, 2.0, 5.0])
    found = loss.advantages(**known, rewards=rewards)
    # A label is predicted from the token before it: the first of a row has none.
    inside = (labels != -100) & (torch.arange(3) > 0)
    gaps = ((logps - teacher) * inside).sum(1).double().numpy()
    expected = leave_one_out_by_hand(rewards.tolist(), gaps, [0, 0, 1, 1], 0.5)
    np.testing.assert_allclose(found.numpy(), np.array(expected)[:, None] * inside.numpy(), atol=1e-6)
    assert loss(labels=labels, student_logits=torch.zeros(4, 3, 5), advantages=found, rollout_logps=logps).isfinite()


def test_the_example_keeps_the_contract(example):
    assert check_loss(example["LOSS"]).ok


def test_it_is_logged_and_continues_bit_for_bit(example, settings_of, quiet, stops, tmp_path):
    changes = {**OWN, "text.refresh": "every_n_steps", "text.every": 2, "text.num_iterations": 2, "train.steps": 4}
    straight = run.train(settings_of("leave-one-out", {**changes, "output": str(tmp_path / "one")}), console=quiet)
    with stops():
        run.train(settings_of("leave-one-out", {**changes, "output": str(tmp_path / "two")}), console=quiet)
    (kept,) = (tmp_path / "two/checkpoints").glob("step-*/sources.json")
    rows = json.loads(kept.read_text(encoding="utf-8"))["main"]["responses"]
    assert all(isinstance(response["reward"], float) for _, many in rows for response in many)
    resumed = resume_folder(tmp_path / "two", console=quiet)
    assert_same_model(straight, resumed)
    lines = read_metrics(straight.metrics)
    assert all(1 < line["text/reward"] <= 8 for line in lines)
    assert [line["text/reward"] for line in lines] == [line["text/reward"] for line in read_metrics(resumed.metrics)]
    samples = [json.loads(line) for line in (straight.path / "samples.jsonl").read_text().splitlines()]
    assert all("reward" in response for row in samples for response in row["responses"])


def test_the_reward_of_the_example(example):
    answers = Answers(["", "one two three", "one"], [(), (), ()], [1, 4, 2], [False, False, True])
    assert example["REWARD"].per_row(answers) == [1.0, 0.25, 0.0]


@pytest.mark.parametrize(
    ("loss", "changes", "message"),
    [
        (
            "leave-one-out",
            {"text.reward": None},
            "text.reward: leave-one-out reads the reward of each response; name a",
        ),
        ("leave-one-out", {"text.reward": "nll"}, "text.reward: nll gives no value for each response"),
        ("leave-one-out", {"text.reward": "words"}, "words says `better` is neither"),
        ("leave-one-out", {"text.reward": "brevety"}, "did you mean brevity"),
        ("minillm", {}, "text.reward: minillm reads no reward"),
        ("kd", {"text.source": "dataset", "text.num_generations": 1}, "the source dataset has no such setting"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_loaded(loss, changes, message, example, settings_of):
    with pytest.raises(SettingsError, match=re.escape(message)):
        settings_of(loss, {**OWN, **changes})


def test_a_function_is_a_reward_from_python(example, toy, tmp_path, stops):
    names: dict[str, object] = {}
    exec(FROM_PYTHON.split("\n\n\n")[0], names)
    short = names["short"]
    given = {"teacher": str(toy / "teacher"), "data": str(toy / "data.jsonl")}
    settings = {
        **{name: value for name, value in OWN.items() if name != "text.reward"},
        "student.init": "layers",
        "student.layers": 2,
        "train.steps": 4,
        "train.batch_size": 2,
        "text.sampling.max_new_tokens": 6,
        "train.log_every": 1,
        "train.device": "cpu",
    }
    straight = dpkd.train(loss="leave-one-out", **given, reward=short, settings=settings, output=tmp_path / "one")
    with stops():
        dpkd.train(loss="leave-one-out", **given, reward=short, settings=settings, output=tmp_path / "two")
    with pytest.raises(DpkdError, match="no metric is called 'short'"):
        dpkd.resume(tmp_path / "two")
    resumed = dpkd.resume(tmp_path / "two", reward=short)
    assert_same_model(straight, resumed)
    assert all(1 / 6 <= line["text/reward"] <= 1 for line in read_metrics(straight.metrics))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([1.0], "gave 1 values for 2 responses"),
        ([1.0, None], "gave a response to b the value None"),
        ([float("nan"), 1.0], "gave a response to a the value nan"),
        (
            ZeroDivisionError("oops"),
            r"the reward bad failed: ZeroDivisionError: oops \(1 of these rows have no reference",
        ),
    ],
)
def test_a_reward_that_fails_is_named(values, message):
    from dpkd.api import Response, Text
    from dpkd.data.encode import Prompt

    def per_row(answers: Answers) -> list[float]:
        assert (list(answers.predictions), list(answers.prompts)) == (["x", "y"], ["p", "q"])
        if isinstance(values, Exception):
            raise values
        return values

    prompts = [Prompt("a", (1,), (2,), ("r",), "p"), Prompt("b", (1,), (), (), "q")]
    reward = Reward(MetricSpec("bad", "", "higher", "bad", per_row=per_row), prompts)
    with pytest.raises(DpkdError, match=message):
        reward([0, 1], [Response((1, 2), Text.STUDENT)] * 2, [" x", "y "])
