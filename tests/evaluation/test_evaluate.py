"""Evaluation of real (toy) models: every row scored once, whatever the order, the batch or an interruption."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from dpkd.api import Answers, MetricSpec, SamplingSettings
from dpkd.data.batches import TokenSequence, micro_batches
from dpkd.data.examples import read_examples
from dpkd.data.settings import DataSettings
from dpkd.errors import DpkdError
from dpkd.evaluation import divergences
from dpkd.evaluation import evaluator as evaluator_module
from dpkd.evaluation.answer_cache import AnswerCache
from dpkd.evaluation.divergences import measure
from dpkd.evaluation.evaluator import EvaluationSettings, Evaluator, metric_specs
from dpkd.evaluation.results import Evaluation, Metric, check_finite, score, score_tokens
from dpkd.evaluation.sets import find_set
from dpkd.models.settings import ModelSettings, TeacherSettings
from dpkd.plugins import load_registry
from dpkd.report.reading import Scored
from dpkd.report.texts import teacher_of
from dpkd.teachers.local import LocalTeacher

DRAWN = EvaluationSettings(SamplingSettings(max_new_tokens=6, batch_size=3), (1, 2, 3), cuts=(2,))


def _write(path: Path, rows: list[dict[str, object]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def evaluator(folder: Path, *, teacher: bool = True) -> Evaluator:
    other = TeacherSettings(model=str(folder / "teacher")) if teacher else None
    return Evaluator(ModelSettings(model=str(folder / "student")), other)


def run(folder: Path, name: str = "rows.jsonl", settings: EvaluationSettings = DRAWN, **more):
    data = DataSettings(path=str(folder / name), **more.pop("data", {}))
    return evaluator(folder).evaluate("rows", data, settings, **more)


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
    append = AnswerCache.append

    def interrupted(self, seed, prediction):
        nonlocal count
        append(self, seed, prediction)
        count += 1
        if count == 16:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(AnswerCache, "append", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(folder, output=tmp_path / "cut")
    part = next((tmp_path / "cut").glob("*.part"))
    part.write_text(part.read_text() + '{"id": "torn')
    drawn = []
    with monkeypatch.context() as patch:
        patch.setattr(AnswerCache, "append", lambda self, seed, p: (drawn.append(p.id), append(self, seed, p)))
        assert run(folder, output=tmp_path / "cut").as_dict() == whole.as_dict()
    assert len(drawn) == 36 - 16
    for seed in (1, 2, 3):
        name = f"predictions-{seed}.jsonl"
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_in_a_notebook_a_result_is_one_line():
    metrics = {"rouge_l": Metric((10.0, 20.0), "× 100", "higher"), "nll": Metric((0.123456,))}
    assert repr(Evaluation(4, (1, 2), metrics)) == "Evaluation(rows=4, seeds=(1, 2): rouge_l=15, nll=0.1235)"


def test_answers_drawn_otherwise_are_not_mixed_in(folder, tmp_path):
    run(folder, output=tmp_path / "out")
    longer = EvaluationSettings(SamplingSettings(max_new_tokens=7), (1,))
    with pytest.raises(DpkdError, match=r"sampled in another way: generation changed"):
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


def test_half_precision_is_read_as_float32_so_that_batches_change_nothing(folder, tmp_path):
    """In bfloat16 the rows beside it in the batch would change an answer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    AutoModelForCausalLM.from_pretrained(folder / "student", dtype=torch.bfloat16).save_pretrained(tmp_path / "half")
    AutoTokenizer.from_pretrained(folder / "student").save_pretrained(tmp_path / "half")
    half = ModelSettings(model=str(tmp_path / "half"))
    data = DataSettings(path=str(folder / "rows.jsonl"))
    found = [
        Evaluator(half, None).evaluate(
            "rows", data, replace(DRAWN, sampling=SamplingSettings(max_new_tokens=6, batch_size=n))
        )
        for n in (1, 5)
    ]
    assert found[0].facts["generation"]["dtype"] == "float32"
    for name in ("rouge_l", "tokens", "distinct_1"):
        assert found[0].metrics[name] == found[1].metrics[name], name
    assert Evaluator(half, None, dtype="auto").dtype == "bfloat16"
    with pytest.raises(DpkdError, match="dtype 'fp16': expected auto, float32, bfloat16, float16"):
        Evaluator(half, None, dtype="fp16")


LONG = [{"prompt": "a", "response": "b"}, {"prompt": "x" * 130, "response": "b"}, {"prompt": "y" * 40, "response": "b"}]


def test_a_prompt_beyond_a_limit_is_an_error_that_says_what_to_set(folder):
    _write(folder / "long.jsonl", LONG)
    with pytest.raises(DpkdError) as caught:
        run(folder, "long.jsonl", data={"max_prompt_tokens": 20})
    assert str(caught.value) == (
        f"{folder / 'long.jsonl'}: 2 of 3 prompts are too long, and 1 of them leave no room for an answer in a model "
        "that reads 128 tokens (the first is long.jsonl:2 with 130 tokens, the longest has 130). Every row that is "
        "read is to be scored. To skip and count such rows: --long-prompts skip"
    )
    _write(folder / "longish.jsonl", LONG[::2])
    with pytest.raises(DpkdError) as caught:
        run(folder, "longish.jsonl", data={"max_prompt_tokens": 20, "max_tokens": 30})
    assert str(caught.value) == (
        f"{folder / 'longish.jsonl'}: 1 of 2 prompts is longer than data.max_prompt_tokens=20 (the first is "
        "longish.jsonl:2 with 40 tokens, the longest has 40). Every row must be scored: --set "
        "data.max_prompt_tokens=40 --set data.max_tokens=296. To skip and count such rows: "
        "--long-prompts skip"
    )
    assert run(folder, "longish.jsonl", data={"max_prompt_tokens": 40, "max_tokens": 296}).rows == 2


def test_long_prompts_are_left_out_when_asked_and_counted(folder):
    _write(folder / "long.jsonl", LONG)
    said: list[str] = []
    skipping = replace(DRAWN, long_prompts="skip")
    result = run(folder, "long.jsonl", skipping, say=said.append)
    assert said == [f"rows: 3 rows of {folder / 'long.jsonl'}", "skipped 1 of 3 rows: prompts longer than 127 tokens"]
    assert result.rows == 2
    assert result.facts["data"]["rows_read"] == 3
    assert result.facts["data"]["skipped"] == {"prompts longer than 127 tokens": 1}
    _write(folder / "longest.jsonl", LONG[1:2])
    with pytest.raises(DpkdError, match=r"no row of 1 is left to score: 1 prompts longer than 127 tokens"):
        run(folder, "longest.jsonl", skipping)


def test_bad_rows_and_short_references_are_counted(folder, tmp_path):
    text = (folder / "rows.jsonl").read_text() + "{torn\n"
    (folder / "bad.jsonl").write_text(text)
    with pytest.raises(DpkdError, match=r"bad.jsonl:13: not JSON"):
        run(folder, "bad.jsonl")
    result = run(folder, "bad.jsonl", data={"on_bad_row": "skip", "min_response_words": 1})
    assert result.facts["data"]["skipped"] == {"not JSON": 1, "first references of at most 1 words": 3}
    assert (result.rows, result.facts["data"]["rows_read"]) == (13 - 4, 13)


def test_references_beyond_the_context_are_cut_and_counted(folder, tmp_path):
    rows = [
        {"prompt": "a", "response": "b" * 300},
        {"prompt": "a", "response": "c"},
        {"prompt": "d" * 125, "response": "e"},
    ]
    _write(folder / "big.jsonl", rows)
    said: list[str] = []
    result = run(folder, "big.jsonl", say=said.append)
    assert said[1:] == [
        "truncated 1 references for the likelihood and the divergences; text metrics use them whole",
        "1 prompts leave less room for an answer in the model than the length limit",
    ]
    assert result.facts["data"]["cut_references"] == 1
    assert math.isfinite(result["forward_kl"])


def test_a_teacher_beside_itself_has_no_divergence(folder, tmp_path):
    own = str(folder / "student")
    same = Evaluator(ModelSettings(model=own), TeacherSettings(model=own)).evaluate(
        "rows",
        DataSettings(path=str(folder / "rows.jsonl")),
        replace(DRAWN, seeds=(1,), rewards=True),
        output=tmp_path / "out",
    )
    for name in ("forward_kl", "reverse_kl", "first_token_forward_kl", "reward_sum", "reward_mean"):
        assert same[name] == pytest.approx(0.0, abs=1e-6), name
    for name in ("student_answer_reward_sum", "teacher_answer_reward_mean"):
        assert same[name] == pytest.approx(0.0, abs=1e-6), name
    assert same["nll"] == pytest.approx(same["teacher_nll"])
    assert same["perplexity"] == pytest.approx(math.exp(same["nll"]))
    own_answers, teachers = (tmp_path / "out" / name for name in ("predictions-1.jsonl", "teacher/predictions-1.jsonl"))
    ids = [[json.loads(line)["ids"] for line in path.read_text().splitlines()] for path in (own_answers, teachers)]
    assert ids[0] == ids[1]


def test_the_answers_of_the_teacher_have_checksums_of_their_own(folder, tmp_path):
    """A report reads both: the answers of two models to one set are two files of one name."""
    Evaluator(ModelSettings(model=str(folder / "student")), TeacherSettings(model=str(folder / "teacher"))).evaluate(
        "rows",
        DataSettings(path=str(folder / "rows.jsonl")),
        replace(DRAWN, seeds=(1,), rewards=True),
        output=tmp_path / "out",
    )
    scored = Scored(tmp_path / "out", json.loads((tmp_path / "out" / "scores.json").read_text()))
    own, theirs = (found.predictions()[1] for found in (scored, teacher_of(scored)))
    assert [row["id"] for row in own] == [row["id"] for row in theirs]
    assert [row["ids"] for row in own] != [row["ids"] for row in theirs]
    with (tmp_path / "out" / "teacher" / "predictions-1.jsonl").open("a") as file:
        file.write(" ")
    with pytest.raises(DpkdError, match=r"teacher/predictions-1\.jsonl is damaged: its checksum"):
        teacher_of(scored).predictions()


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
    parts = evaluator(folder)
    sequences = [TokenSequence((1, 2, 3), (4, 5, 256)), TokenSequence((9,), (8, 256)), TokenSequence((7, 7), (3,))]
    found = measure(
        parts.model,
        sequences,
        teacher=parts.teacher,
        vocabulary=257,
        pad_id=256,
        text_bytes=11,
        batch_size=2,
        chunk_mib=1e-6,
    )
    assert isinstance(parts.teacher, LocalTeacher)
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
        "nll": nll / 6,
        "perplexity": math.exp(nll / 6),
        "bits_per_byte": nll / math.log(2) / 11,
        "teacher_nll": teacher_nll / 6,
        "forward_kl": forward / 6,
        "reverse_kl": reverse / 6,
        "first_token_forward_kl": np.mean([f for f, _ in first]),
        "first_token_reverse_kl": np.mean([r for _, r in first]),
        "reward_sum": np.mean([s for s, _ in rewards]),
        "reward_mean": np.mean([m for _, m in rewards]),
    }
    # Differences of float32 log-probs near -6 nats, each rounded to 5e-7.
    assert {
        name: metric.mean for name, metric in score_tokens(found, metric_specs(load_registry({}))).items()
    } == pytest.approx(expected, rel=1e-4, abs=5e-6)
    alone = measure(parts.model, sequences, teacher=None, vocabulary=257, pad_id=256)
    assert set(score_tokens(alone, metric_specs(load_registry({})))) == {"nll", "perplexity"}


def test_a_gpu_measures_few_large_batches():
    """Of 500 sequences of 400 tokens: on a CPU 16 at a time, on a GPU as many as 32,768 tokens are."""
    assert len(micro_batches([400] * 500, *divergences._limits(None, torch.device("cpu")))) == 32
    assert len(micro_batches([400] * 500, *divergences._limits(None, torch.device("cuda")))) == 7
    assert divergences._limits(3, torch.device("cuda")) == (3, None)


def test_text_is_decoded_for_the_references_alone(folder, monkeypatch):
    """Bits per byte is theirs; rewards of answers need no text."""
    decoded = []
    real = evaluator_module.continuation
    monkeypatch.setattr(evaluator_module, "continuation", lambda *a: decoded.append(a) or real(*a))
    found = run(folder, settings=replace(DRAWN, rewards=True))
    assert found["bits_per_byte"] > 0
    assert len(decoded) == found.rows


@pytest.mark.parametrize("who", ["model", "teacher"])
def test_a_model_of_nan_is_an_error_and_leaves_no_scores(folder, tmp_path, who):
    parts = evaluator(folder)
    damaged = parts.model if who == "model" else parts.teacher.model
    with torch.no_grad():
        damaged.lm_head.weight[5:9].fill_(float("nan"))
    greedy = replace(DRAWN, sampling=SamplingSettings(max_new_tokens=2, temperature=0.0))
    with pytest.raises(DpkdError, match=rf"the {who} gives .*: its weights are damaged"):
        parts.evaluate("rows", DataSettings(path=str(folder / "rows.jsonl")), greedy, output=tmp_path / "out")
    assert not (tmp_path / "out" / "scores.json").exists()


def test_an_infinite_metric_is_not_written():
    with pytest.raises(DpkdError, match="not finite: odd; no scores are written"):
        check_finite({"nll": Metric((1.0,)), "odd": Metric((1.0, math.inf))})


ANSWERS = Answers(["the cat", "a b c d a b c d", ""], [["the cat"], ["x"], ["y", "z"]], [3, 9, 1], [False, True, False])


def test_the_built_in_metrics_by_hand():
    metrics, _, rows = score({1: ANSWERS}, metric_specs(load_registry({})), cuts=())
    assert {name: metric.mean for name, metric in metrics.items()} == pytest.approx(
        {
            "rouge_l": 100 / 3,
            "exact_match": 100 / 3,
            "words": 10 / 3,
            "tokens": 13 / 3,
            "eos_rate": 200 / 3,
            "repetition": 20.0,
            "distinct_1": 60.0,
            "distinct_2": 100 * 5 / 8,
        }
    )
    assert [row.get("repetition") for row in rows[1]] == [None, 20.0, None]


def test_a_metric_that_loses_rows_gives_no_score():
    lossy = {"lossy": MetricSpec("lossy", "", "", "Loses a row.", per_row=lambda answers: [1.0])}
    with pytest.raises(DpkdError, match="lossy gave 1 values for 3 rows"):
        score({1: ANSWERS}, lossy)


def test_the_papers_sets_by_name(tmp_path, monkeypatch):
    assert find_set("sinst").path == "MiniLLM/sinst"
    assert [find_set(name).defaults.get("min_response_words") for name in ("sinst", "uinst", "dolly")] == [10, 10, None]
    (tmp_path / "dolly.jsonl").write_text("{}")
    assert find_set("dolly", str(tmp_path)).path == str(tmp_path / "dolly.jsonl")
    with pytest.raises(DpkdError, match=r"the set vicuna is not in .*: expected vicuna.jsonl or a folder vicuna"):
        find_set("vicuna", str(tmp_path))
    names = [find_set(f"some/where/{file}.jsonl").name for file in ("eval", "dev", "rows")]
    assert names == ["where", "where-dev", "rows"]
    # What is here wins over a name, and flags over the set over the run.
    (tmp_path / "vicuna").mkdir()
    monkeypatch.chdir(tmp_path)
    assert find_set("vicuna", str(tmp_path)).defaults == {}
    given = find_set("dolly", str(tmp_path)).given({"template": "chat", "columns": {"output": "x"}}, {"limit": None})
    assert (given["template"], given["columns"], given["max_prompt_tokens"]) == ("alpaca", {}, 256)
    assert "limit" not in given


@pytest.mark.parametrize(
    ("files", "split"),
    [
        (("train", "dev", "eval"), "eval"),
        (("train", "valid"), "valid"),
        (("train",), "train"),
        (("test-00000-of-00001", "train"), "test"),
        (("rows",), None),
    ],
)
def test_of_a_folder_the_held_out_split_is_read(tmp_path, files, split):
    for name in files:
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"prompt": "a", "response": name}) + "\n")
    one = find_set(str(tmp_path))
    assert one.defaults.get("split") == split
    (example,) = read_examples(DataSettings(**one.given({}, {}))).examples
    assert example.references == (next(f for f in files if f.startswith(split or "rows")),)


def test_plugins_that_break_are_said(install_plugin):
    install_plugin("strangers", {"odd": "raise ImportError('no')"})
    said: list[str] = []
    metric_specs(load_registry({"DPKD_PLUGINS": "strangers"}), said.append)
    assert said == ["the plugin odd (strangers) could not be loaded: ImportError: no"]


def test_answers_under_one_seed_do_not_depend_on_the_others(folder, tmp_path):
    run(folder, output=tmp_path / "three")
    run(folder, settings=replace(DRAWN, seeds=(2,)), output=tmp_path / "one")
    name = "predictions-2.jsonl"
    assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "three" / name).read_bytes()
