"""A run whose teacher is a store: the same as with the model where the numbers are enough, refused where not."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from test_invariants import gradients

from dpkd.api import Card, LossConfig, LossSpec, Signal, Source, TokenInputs, TokenLoss, Trait, setting
from dpkd.data.batches import Layout, TokenSequence, collate
from dpkd.errors import DpkdError, SettingsError
from dpkd.functional import kl
from dpkd.plugins import RegisteredLoss
from dpkd.run_metrics import read_metrics
from dpkd.teachers.store import StoreTeacher
from dpkd.teachers.store_manifest import Manifest, read_manifest
from dpkd.teachers.store_shards import Shards
from dpkd.teachers.store_writing import write_store
from dpkd.train import run
from dpkd.train.cache import cache

PAIRS = {"text.chosen": "teacher", "text.rejected": "dataset"}


class _TopConfig(LossConfig):
    k: int = setting(8, description="kept tokens", source="made up", ge=1)


class _TopLoss(TokenLoss[_TopConfig]):
    """KL over the teacher's k likeliest tokens and the rest, with the straightforward code."""

    def forward(self, x: TokenInputs) -> torch.Tensor:
        log_p, log_q = x.teacher_log_probs(), x.student_log_probs()
        ids = log_p.topk(self.config.k, dim=-1).indices

        def outcomes(log: torch.Tensor) -> torch.Tensor:
            rest = log.scatter(-1, ids, -torch.inf).logsumexp(-1, keepdim=True)
            return torch.cat([log.gather(-1, ids), rest], -1)

        return kl(outcomes(log_p), outcomes(log_q))


TOP = LossSpec(
    "top",
    _TopLoss,
    _TopConfig,
    Card("t", "s", "f", (Source("t", "https://example.org"),), "u", "a"),
    frozenset({Signal.STUDENT_LOGITS, Signal.TEACHER_LOGITS}),
    top_k=lambda config: config.k,
)


def _with_loss(resolved, spec=TOP):
    """The same run with a loss that no plugin has."""
    registered = RegisteredLoss(spec, "test", "1", spec.name, "test")
    return replace(resolved, main=replace(resolved.main, registered=registered, config=spec.config()))


def _without_model(settings_of, loss, store, changes=None, **more):
    return settings_of(
        loss,
        {"student.init": "pretrained", "student.layers": None, **(changes or {}), "teacher.store": str(store)},
        teacher=None,
        **more,
    )


def _student(toy):
    return {"student.init": "pretrained", "student.layers": None, "student.model": str(toy / "gpt2")}


def test_pairs_from_a_store_are_those_of_the_model(settings_of, toy, quiet, tmp_path):
    """Log-probs of given tokens serve every pair loss on fixed text: equal gradients, and no teacher in memory."""
    common = _student(toy) | PAIRS
    resolved = settings_of("dpkd", common)
    manifest = cache(resolved, tmp_path / "store", console=quiet)
    assert (manifest.kind, manifest.text) == ("tokens", ("dataset", "teacher"))
    live = gradients(resolved, quiet)[0]
    stored, _, train_step = gradients(_without_model(settings_of, "dpkd", tmp_path / "store", common), quiet)
    assert isinstance(train_step.teacher, StoreTeacher)
    for name, gradient in live.items():
        torch.testing.assert_close(stored[name], gradient, rtol=1e-4, atol=1e-8)
    folder = run.train(_without_model(settings_of, "dpkd", tmp_path / "store", common), console=quiet)
    (first, *_) = read_metrics(folder.metrics)
    assert "reward/margin" in first
    assert "kl/forward" not in first, "a store has no whole distribution to measure against"


def test_top_k_from_a_store_is_that_of_the_model(settings_of, toy, quiet, tmp_path):
    resolved = _with_loss(settings_of("rkl", _student(toy)))
    manifest = cache(resolved, tmp_path / "store", dtype="float32", console=quiet)
    assert (manifest.kind, manifest.k) == ("topk", 8)
    live = gradients(resolved, quiet)[0]
    stored = _with_loss(settings_of("sft", _student(toy) | {"teacher.store": str(tmp_path / "store")}, teacher=None))
    found = gradients(stored, quiet)[0]
    for name, gradient in live.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-8)


def test_a_mean_over_draws_is_the_teacher(toy, tmp_path):
    """The empirical distribution of a store of samples goes to the teacher's: here 4,000 draws at each position."""
    from dpkd.api.teachers import Wants
    from dpkd.models.loading import load_model
    from dpkd.models.settings import ModelSettings
    from dpkd.teachers.local import LocalTeacher

    teacher = LocalTeacher.of(
        load_model(ModelSettings(model=str(toy / "teacher")), device="cpu", dtype=None), 257, torch.device("cpu")
    )
    sequences = [TokenSequence((1, 2, 3), (4, 5, 256)), TokenSequence((9,), (8, 256))]
    manifest = Manifest("sampled", 4000, "m", "teacher", "t", 257, ("dataset",), "d", "none", "float32", 1)
    assert write_store(tmp_path, teacher, sequences, manifest, pad_id=256) == 2
    assert write_store(tmp_path, teacher, sequences, manifest, pad_id=256) == 0, "nothing is written twice"
    batch = collate(sequences[::-1], pad_id=256, layout=Layout(columns=8))
    wants, store = Wants(64, logits=True), StoreTeacher(tmp_path)
    store.load(torch.device("cpu"))
    found = store.score(batch, wants).logits(slice(None)).exp()
    wanted = teacher.score(batch, wants).logits(slice(None)).softmax(-1)
    np.testing.assert_allclose(found.sum(-1).numpy(), 1.0, rtol=1e-5)
    # Four standard errors of a share of 4,000 draws.
    assert ((found - wanted).abs() <= 4 * (wanted * (1 - wanted) / 4000).sqrt() + 1e-4).all()


def test_an_interrupted_store_is_continued(settings_of, toy, quiet, tmp_path, monkeypatch):
    from dpkd.teachers import store_writing as caching

    monkeypatch.setattr(caching, "SHARD_TOKENS", 40)
    whole = tmp_path / "whole"
    resolved = settings_of("kd", _student(toy))
    cache(resolved, whole, batch_size=2, console=quiet)
    add, count = Shards.add, 0

    def interrupted(self, sequences):
        nonlocal count
        add(self, sequences)
        count += 1
        if count == 2:
            raise KeyboardInterrupt

    cut = tmp_path / "cut"
    with monkeypatch.context() as patch:
        patch.setattr(Shards, "add", interrupted)
        with pytest.raises(KeyboardInterrupt):
            cache(resolved, cut, batch_size=2, console=quiet)
    (cut / "shard-00002.part").write_bytes(b"half")
    cache(resolved, cut, batch_size=2, console=quiet)
    one, two = Shards(whole), Shards(cut)
    assert len(one) == len(two) == len({*one._places})
    for key in one._places:
        a, b = one.read(key), two.read(key)
        assert all(torch.equal(a[name], b[name]) for name in ("logps", "ids"))


def test_a_run_from_a_store_of_samples_trains(settings_of, toy, quiet, tmp_path):
    manifest = cache(settings_of("kd", _student(toy)), tmp_path / "store", k=20, console=quiet)
    assert (manifest.kind, manifest.k) == ("sampled", 20)
    folder = run.train(_without_model(settings_of, "kd", tmp_path / "store", _student(toy)), console=quiet)
    before = load_file(toy / "gpt2" / "model.safetensors")
    after = load_file(folder.model / "model.safetensors")
    assert any(not torch.equal(before[name], after[name]) for name in before)
    assert json.loads(folder.facts.read_text())["models"]["teacher"] == manifest.model


@pytest.mark.parametrize(
    ("loss", "changes", "problem"),
    [
        ("rkl", {}, "teacher.store: rkl reads whole distributions, and the store has 20 sampled tokens; only the"),
        ("kd", {"loss.temperature": 2.0}, "teacher.store: kd reads whole distributions"),
        ("dpkd", {}, "teacher.store: dpkd reads the teacher on responses that the student writes during"),
        ("dpkd", PAIRS, "teacher.store: the store has responses by dataset, not by teacher; write it with `dpkd "),
        ("rkl", {"text.source": "student", "text.teacher_mix": 0.2}, "teacher.store: text.teacher_mix mixes the"),
        ("rkl", {"text.source": "student", "text.teacher_veto": 25}, "teacher.store: text.teacher_veto lets the"),
    ],
)
def test_what_a_store_cannot_serve_is_refused_with_what_would(
    loss, changes, problem, settings_of, toy, quiet, tmp_path
):
    cache(settings_of("kd", _student(toy)), tmp_path / "store", k=20, console=quiet)
    with pytest.raises(SettingsError) as caught:
        _without_model(settings_of, loss, tmp_path / "store", _student(toy) | changes)
    assert any(found.startswith(problem) for found in caught.value.problems), caught.value.problems


def test_other_data_than_the_stores_is_found_out(settings_of, toy, quiet, tmp_path):
    cache(settings_of("kd", _student(toy)), tmp_path / "store", k=20, console=quiet)
    rows = [{"prompt": "another", "response": "text"}] * 4
    (tmp_path / "other.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    changes = _student(toy) | {"data.path": str(tmp_path / "other.jsonl")}
    with pytest.raises(DpkdError, match="has no numbers for a response of this run"):
        run.train(_without_model(settings_of, "kd", tmp_path / "store", changes), console=quiet)


def test_a_folder_that_is_no_store_and_two_teachers(settings_of, toy, tmp_path):
    with pytest.raises(SettingsError, match="is no store of teacher log-probs"):
        _without_model(settings_of, "kd", tmp_path, _student(toy))
    with pytest.raises(SettingsError, match="name either `model` or `store`"):
        settings_of("kd", _student(toy) | {"teacher.store": str(tmp_path)})


def test_a_store_keeps_its_kind(settings_of, toy, quiet, tmp_path):
    cache(settings_of("kd", _student(toy)), tmp_path / "store", k=20, console=quiet)
    with pytest.raises(DpkdError, match="holds other numbers: k differ"):
        cache(settings_of("kd", _student(toy)), tmp_path / "store", k=21, console=quiet)
    assert read_manifest(tmp_path / "store").bytes_per_token == 4 + 20 * 4


def test_the_linear_trait_is_the_one_of_kd():
    from dpkd.plugins import load_registry

    linear = {name for name, loss in load_registry().losses.items() if Trait.LINEAR_IN_TEACHER in loss.spec.traits}
    assert "kd" in linear
    assert "rkl" not in linear


def test_the_path_of_a_store_may_be_relative(settings_of, toy, quiet, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cache(settings_of("kd", _student(toy)), Path("store"), k=5, console=quiet)
    run.train(_without_model(settings_of, "kd", "store", _student(toy)), console=quiet)
