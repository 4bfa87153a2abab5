"""Evaluation of real (toy) models: every row scored once, whatever the order, the batch or an interruption."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from dpkd.api import Answers, MetricSpec
from dpkd.data.batches import TokenSequence
from dpkd.data.settings import DataSettings
from dpkd.errors import DpkdError
from dpkd.evaluation import evaluate as module
from dpkd.evaluation.answers import Desk
from dpkd.evaluation.divergences import measure
from dpkd.evaluation.evaluate import Bench, EvaluationSettings, metric_specs
from dpkd.evaluation.results import score
from dpkd.evaluation.sets import EvalSet, find_set
from dpkd.models.settings import ModelSettings, TeacherSettings
from dpkd.teachers.live import LiveTeacher
from dpkd.text.settings import SamplingSettings

WORDS = ["red", "blue", "green", "old", "new", "big", "small", "cat", "dog", "tree", "house", "river", "sings", "runs"]
DRAWN = EvaluationSettings(SamplingSettings(max_new_tokens=6, batch_size=3), (1, 2, 3), cuts=(2,))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two byte-level Llamas of different weights, and a set with short and long references."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("evaluation")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<eos>", special=True)])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<eos>")
    config = LlamaConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, vocab_size=257,
        bos_token_id=256, eos_token_id=256, max_position_embeddings=128,
    )  # fmt: skip
    for seed, name in enumerate(("student", "teacher")):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 2:
                    parameter.mul_(4)
        model.save_pretrained(folder / name)
        fast.save_pretrained(folder / name)
    rows = [
        {"prompt": " ".join(WORDS[i % 7 : i % 7 + 1 + i % 3]), "response": " ".join(WORDS[i % 5 : i % 5 + 1 + i % 4])}
        for i in range(12)
    ]
    _write(folder / "rows.jsonl", rows)
    return folder


def _write(path: Path, rows: list[dict[str, object]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def bench(folder: Path, *, teacher: bool = True) -> Bench:
    other = TeacherSettings(model=str(folder / "teacher")) if teacher else None
    return Bench(ModelSettings(model=str(folder / "student")), other)


def run(
    folder: Path, name: str = "rows.jsonl", settings: EvaluationSettings = DRAWN, one: EvalSet | None = None, **more
):
    path = str(folder / name)
    data = DataSettings(path=path, **more.pop("data", {}))
    return bench(folder).evaluate(one or EvalSet("rows", path), data, settings, **more)


def test_every_row_is_scored_under_every_seed(folder, tmp_path):
    result = run(folder, output=tmp_path / "out")
    assert (result.rows, result.seeds) == (12, (1, 2, 3))
    files = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert files == ["answers.json", "predictions-1.jsonl", "predictions-2.jsonl", "predictions-3.jsonl", "scores.json"]
    scores = json.loads((tmp_path / "out/scores.json").read_text())
    assert (scores["format"], scores["rows"], scores["data"]["rows_read"]) == (2, 12, 12)
    for name, metric in scores["metrics"].items():
        assert metric["mean"] == pytest.approx(np.mean(metric["values"])), name
        if len(metric["values"]) > 1:
            assert metric["sd"] == pytest.approx(np.std(metric["values"], ddof=1)), name
    assert scores["metrics"]["nll"]["sd"] is None, "a likelihood has no seed"
    for seed, value in zip((1, 2, 3), scores["metrics"]["rouge_l"]["values"], strict=True):
        lines = [json.loads(line) for line in (tmp_path / f"out/predictions-{seed}.jsonl").read_text().splitlines()]
        assert [line["id"] for line in lines] == [f"rows.jsonl:{i}" for i in range(1, 13)]
        assert np.mean([line["scores"]["rouge_l"] for line in lines]) == pytest.approx(value)
    assert sum(bucket["rows"] for bucket in scores["lengths"]["buckets"]) == 12
    by_length = [b["rows"] * b["metrics"]["rouge_l"]["mean"] for b in scores["lengths"]["buckets"]]
    assert sum(by_length) / 12 == pytest.approx(scores["metrics"]["rouge_l"]["mean"])


def test_an_interrupted_evaluation_goes_on_to_the_same_result(folder, tmp_path, monkeypatch):
    whole = run(folder, output=tmp_path / "whole")
    count = 0
    append = Desk.append

    def interrupted(self, seed, prediction):
        nonlocal count
        append(self, seed, prediction)
        count += 1
        if count == 16:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Desk, "append", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(folder, output=tmp_path / "cut")
    part = next((tmp_path / "cut").glob("*.part"))
    part.write_text(part.read_text() + '{"id": "torn')
    drawn = []
    with monkeypatch.context() as patch:
        patch.setattr(Desk, "append", lambda self, seed, p: (drawn.append(p.id), append(self, seed, p)))
        assert run(folder, output=tmp_path / "cut").as_dict() == whole.as_dict()
    assert len(drawn) == 36 - 16
    for seed in (1, 2, 3):
        name = f"predictions-{seed}.jsonl"
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_answers_drawn_otherwise_are_not_mixed_in(folder, tmp_path):
    run(folder, output=tmp_path / "out")
    longer = EvaluationSettings(SamplingSettings(max_new_tokens=7), (1,))
    with pytest.raises(DpkdError, match=r"drawn otherwise: generation changed"):
        run(folder, settings=longer, output=tmp_path / "out")


@pytest.mark.parametrize("batch", [1, 5])
def test_neither_order_nor_batch_changes_a_greedy_answer(folder, tmp_path, batch):
    rows = (folder / "rows.jsonl").read_text().splitlines(keepends=True)
    (folder / "back.jsonl").write_text("".join(reversed(rows)))
    greedy = EvaluationSettings(SamplingSettings(temperature=0.0, max_new_tokens=6, batch_size=3))
    other = EvaluationSettings(SamplingSettings(temperature=0.0, max_new_tokens=6, batch_size=batch))
    one, two = run(folder, settings=greedy), run(folder, "back.jsonl", other)
    assert one.seeds == (10,)
    for name, metric in one.metrics.items():
        assert two.metrics[name].mean == pytest.approx(metric.mean, rel=1e-5), name


def test_no_row_is_left_out_silently(folder, tmp_path):
    long = [{"prompt": "a", "response": "b"}, {"prompt": "x" * 130, "response": "b"}]
    _write(folder / "long.jsonl", long)
    with pytest.raises(
        DpkdError, match=r"1 of 2 prompts leave no room for an answer: long.jsonl:2 has 130 tokens, and"
    ):
        run(folder, "long.jsonl")
    said: list[str] = []
    rule = EvalSet("long", str(folder / "long.jsonl"), max_prompt_tokens=64)
    result = run(folder, "long.jsonl", one=rule, say=said.append)
    assert said == ["left out 1: prompts longer than 64 tokens"]
    assert result.rows == 1
    assert result.facts["data"] == {
        "path": str(folder / "long.jsonl"), "fingerprint": result.facts["data"]["fingerprint"], "rows_read": 2,
        "left_out": {"prompts longer than 64 tokens": 1},
    }  # fmt: skip
    # The filters of training play no part here.
    assert run(folder, data={"max_prompt_tokens": 2, "max_tokens": 4, "min_response_words": 9}).rows == 12


def test_bad_rows_and_short_references_are_counted(folder, tmp_path):
    text = (folder / "rows.jsonl").read_text() + "{torn\n"
    (folder / "bad.jsonl").write_text(text)
    with pytest.raises(DpkdError, match=r"bad.jsonl:13: not JSON"):
        run(folder, "bad.jsonl")
    rule = EvalSet("bad", str(folder / "bad.jsonl"), min_reference_words=2)
    result = run(folder, "bad.jsonl", one=rule, data={"on_bad_row": "skip"})
    assert result.facts["data"]["left_out"] == {"not JSON": 1, "references of fewer than 2 words": 3}
    assert result.rows == 13 - 4


def test_references_beyond_the_context_are_cut_and_counted(folder, tmp_path):
    _write(folder / "big.jsonl", [{"prompt": "a", "response": "b" * 300}, {"prompt": "a", "response": "c"}])
    said: list[str] = []
    result = run(folder, "big.jsonl", say=said.append)
    assert said == ["cut 1: references that the model cannot read to their end, for the divergences"]
    assert result.facts["cut_references"] == 1
    assert math.isfinite(result["forward_kl"])


def test_a_teacher_beside_itself_has_no_divergence(folder):
    own = str(folder / "student")
    same = Bench(ModelSettings(model=own), TeacherSettings(model=own)).evaluate(
        EvalSet("rows", "rows"),
        DataSettings(path=str(folder / "rows.jsonl")),
        EvaluationSettings(seeds=(1,), rewards=True),
    )
    for name in ("forward_kl", "reverse_kl", "first_token_forward_kl", "reward_sum", "reward_mean"):
        assert same[name] == pytest.approx(0.0, abs=1e-6), name
    for name in ("student_answer_reward_sum", "teacher_answer_reward_mean"):
        assert same[name] == pytest.approx(0.0, abs=1e-6), name
    assert same["nll"] == pytest.approx(same["teacher_nll"])
    assert same["perplexity"] == pytest.approx(math.exp(same["nll"]))


def _log_probs(model, sequence: TokenSequence) -> np.ndarray:
    """Float64 log-probs of the positions that predict the response, from transformers' own logits."""
    ids = torch.tensor([[*sequence.prompt_ids, *sequence.response_ids]])
    with torch.no_grad():
        logits = model(ids).logits[0].double().numpy()
    rows = logits[len(sequence.prompt_ids) - 1 : -1]
    return (
        rows - np.log(np.exp(rows - rows.max(-1, keepdims=True)).sum(-1, keepdims=True)) - rows.max(-1, keepdims=True)
    )


def test_divergences_are_those_of_the_definition(folder):
    """Against loops over transformers' logits: no chunks, no packing, no batches."""
    parts = bench(folder)
    sequences = [TokenSequence((1, 2, 3), (4, 5, 256)), TokenSequence((9,), (8, 256)), TokenSequence((7, 7), (3,))]
    found = measure(
        parts.model, sequences, teacher=parts.teacher, vocabulary=257, pad_id=256, text_bytes=11, batch_size=2,
        chunk_mib=1e-6,
    )  # fmt: skip
    assert isinstance(parts.teacher, LiveTeacher)
    nll = teacher_nll = forward = reverse = 0.0
    first, rewards = [], []
    for sequence in sequences:
        q, p = _log_probs(parts.model, sequence), _log_probs(parts.teacher.model, sequence)
        at = np.arange(len(sequence.response_ids)), list(sequence.response_ids)
        nll, teacher_nll = nll - q[at].sum(), teacher_nll - p[at].sum()
        f, r = (np.exp(p) * (p - q)).sum(-1), (np.exp(q) * (q - p)).sum(-1)
        forward, reverse = forward + f.sum(), reverse + r.sum()
        first.append((f[0], r[0]))
        rewards.append(((q[at] - p[at]).sum(), (q[at] - p[at]).mean()))
    expected = {
        "tokens": 6, "nll": nll / 6, "perplexity": math.exp(nll / 6), "bits_per_byte": nll / math.log(2) / 11,
        "teacher_nll": teacher_nll / 6, "forward_kl": forward / 6, "reverse_kl": reverse / 6,
        "first_token_forward_kl": np.mean([f for f, _ in first]),
        "first_token_reverse_kl": np.mean([r for _, r in first]),
        "reward_sum": np.mean([s for s, _ in rewards]), "reward_mean": np.mean([m for _, m in rewards]),
    }  # fmt: skip
    assert found.as_dict() == pytest.approx(expected, rel=1e-4)


ANSWERS = Answers(["the cat", "a b c d a b c d", ""], [["the cat"], ["x"], ["y", "z"]], [3, 9, 1], [False, True, False])


def test_the_built_in_metrics_by_hand():
    metrics, _, rows = score({1: ANSWERS}, metric_specs(), cuts=())
    assert {name: metric.mean for name, metric in metrics.items()} == pytest.approx({
        "rouge_l": 100 / 3, "exact_match": 100 / 3, "words": 10 / 3, "tokens": 13 / 3, "eos_rate": 200 / 3,
        "repetition": 20.0, "distinct_1": 60.0, "distinct_2": 100 * 5 / 8,
    })  # fmt: skip
    assert [row.get("repetition") for row in rows[1]] == [None, 20.0, None]


def test_a_metric_that_loses_rows_gives_no_score():
    lossy = {"lossy": MetricSpec("lossy", "", "", "Loses a row.", per_row=lambda answers: [1.0])}
    with pytest.raises(DpkdError, match="lossy gave 1 values for 3 rows"):
        score({1: ANSWERS}, lossy)


def test_the_papers_sets_by_name(tmp_path):
    assert find_set("sinst").path == "MiniLLM/sinst"
    assert (find_set("sinst").min_reference_words, find_set("dolly").min_reference_words) == (11, 0)
    (tmp_path / "dolly.jsonl").write_text("{}")
    assert find_set("dolly", str(tmp_path)).path == str(tmp_path / "dolly.jsonl")
    with pytest.raises(DpkdError, match=r"the set vicuna is not in .*: expected vicuna.jsonl or a folder vicuna"):
        find_set("vicuna", str(tmp_path))
    assert find_set("some/where/eval.jsonl").name == "where"


def test_plugins_that_break_are_said(folder, monkeypatch):
    from dpkd.host import BrokenPlugin

    specs = metric_specs()
    monkeypatch.setattr(module, "load_metrics", lambda: (specs, [BrokenPlugin("odd", "strangers", "ImportError: no")]))
    said: list[str] = []
    metric_specs(said.append)
    assert said == ["the metrics of odd (strangers) could not be loaded: ImportError: no"]
