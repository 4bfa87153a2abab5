"""Rewards by token: against logits of the models themselves, and from a run folder to the file."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from report_folders import add_scores, lines, make_run
from scipy.special import log_softmax
from transformers import LlamaConfig, LlamaForCausalLM

from dpkd.data.batches import TokenSequence
from dpkd.errors import DpkdError
from dpkd.report.reading import read_run
from dpkd.report.token_rewards import answers_of, token_rewards, write_token_rewards
from dpkd.teachers.local import LocalTeacher

SHARED = Path(os.environ.get("DPKD_SHARED", Path(__file__).parents[2].parent / "shared"))
STORIES = SHARED / "models" / "stories260K"


def tiny(seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=31,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        initializer_range=0.3,
    )
    return LlamaForCausalLM(config)


def test_each_token_has_beta_times_the_difference_of_log_probs() -> None:
    student, teacher = tiny(1), tiny(2)
    student.train()
    sequences = [TokenSequence((3, 4, 5), (6, 7, 8, 9)), TokenSequence((3,), (1, 2))]
    found = token_rewards(
        student, LocalTeacher.of(teacher, 31, torch.device("cpu")), sequences, vocabulary=31, pad_id=0, beta=0.5
    )
    assert student.training, "left as it was"
    student.eval()
    for sequence, rewards in zip(sequences, found, strict=True):
        ids = [*sequence.prompt_ids, *sequence.response_ids]
        logps = []
        for model in (student, teacher):
            logits = model(input_ids=torch.tensor([ids])).logits[0].detach().double().numpy()
            logps.append(log_softmax(logits, axis=-1))
        first = len(sequence.prompt_ids)
        wanted = [0.5 * (logps[0][t - 1, ids[t]] - logps[1][t - 1, ids[t]]) for t in range(first, len(ids))]
        np.testing.assert_allclose(rewards, wanted, atol=1e-5)
        assert np.abs(wanted).max() > 0.01


def test_answers_come_from_the_evaluation_else_from_the_samples(tmp_path: Path) -> None:
    path = make_run(tmp_path / "a")
    sampled = answers_of(read_run(path), 3)
    assert [(a.writer, a.text) for a in sampled] == [("teacher", "sampled <b>bold</b>"), ("student", "")]
    add_scores(path / "eval", {10: [1.0, 2.0], 20: [1.0, 2.0]})
    lines(path / "eval" / "dolly" / "teacher" / "predictions-10.jsonl", [{"id": "r:0", "prediction": "t", "ids": [4]}])
    evaluated = answers_of(read_run(path), 2)
    assert [(a.writer, a.text, a.ids) for a in evaluated] == [
        ("student", "hello", ()),
        ("teacher", "t", (4,)),
        ("student", "hello", ()),
    ]
    shutil.rmtree(path / "eval")
    (path / "samples.jsonl").unlink()
    with pytest.raises(DpkdError, match="no answers to look at"):
        answers_of(read_run(path), 2)


def test_a_run_without_a_teacher_has_no_rewards(tmp_path: Path) -> None:
    path = make_run(tmp_path / "a", "sft")
    config = (path / "config.resolved.yaml").read_text().replace("model: /models/big", "model: null")
    (path / "config.resolved.yaml").write_text(config)
    (path / "model").mkdir()
    with pytest.raises(DpkdError, match="without a teacher"):
        write_token_rewards(read_run(path), 1)


@pytest.mark.skipif(not STORIES.is_dir(), reason="no shared models: set DPKD_SHARED")
def test_from_a_run_folder_to_its_file(tmp_path: Path) -> None:
    """Student and teacher are one model: every reward is 0, and the tokens spell the answer."""
    path = make_run(tmp_path / "a")
    config = (path / "config.resolved.yaml").read_text().replace("/models/big", str(STORIES))
    (path / "config.resolved.yaml").write_text(config)
    shutil.copytree(STORIES, path / "model")
    text = " a little café.\nShe sang 🎈!"
    responses = [{"writer": "student", "text": text}]
    lines(path / "samples.jsonl", [{"step": 4, "id": "a", "prompt": "Once upon a time", "responses": responses}])
    (row,) = json.loads(write_token_rewards(read_run(path), 1).read_text(encoding="utf-8"))
    assert (row["prompt"], row["writer"]) == ("Once upon a time", "student")
    assert "".join(token["text"] for token in row["tokens"]) == text
    assert len(row["tokens"]) > 5
    assert all(token["reward"] == 0.0 for token in row["tokens"])
