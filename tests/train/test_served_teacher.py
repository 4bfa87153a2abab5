"""A teacher on a server: the same run as with the model in memory, and what is refused, survived or said of failures.

The server is the tests' own (`fake_teacher_server`); `test_real_vllm.py` has vLLM itself.
"""

from __future__ import annotations

import asyncio
import json
import math

import httpx
import pytest
import torch
from fake_teacher_server import FakeServer
from test_invariants import gradients

from dpkd.api import TeacherLost
from dpkd.errors import DpkdError, SettingsError
from dpkd.models.settings import ClientSettings
from dpkd.run_metrics import read_metrics
from dpkd.teachers.server.client import Client
from dpkd.teachers.server.teacher import ServerTeacher
from dpkd.teachers.store import StoreTeacher
from dpkd.train import resume, run
from dpkd.train.cache import cache
from dpkd.train.plan import make_plan
from dpkd.train.progress import Display

FAST = {"teacher.client.retries": 2, "teacher.client.read_timeout": 5.0}


@pytest.fixture
def server(toy):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    one = FakeServer(
        AutoModelForCausalLM.from_pretrained(toy / "teacher"), AutoTokenizer.from_pretrained(toy / "teacher")
    )
    yield one
    one.close()


@pytest.fixture
def served(settings_of, toy, server):
    """`served(loss, changes)`: settings of a run of the toy GPT-2 whose teacher is the server."""

    def make(loss, changes=None, **more):
        student = {"student.init": "pretrained", "student.layers": None, "student.model": str(toy / "gpt2")}
        values = {**student, "teacher.server": f"{server.url}/v1", **FAST, **(changes or {})}
        return settings_of(loss, values, teacher=None, **more)

    return make


def _local(settings_of, toy, loss, changes=None):
    student = {"student.init": "pretrained", "student.layers": None, "student.model": str(toy / "gpt2")}
    return settings_of(loss, {**student, **(changes or {})})


CASES = [
    ("topk-kl", {"loss.k": 8}),
    ("dpkd", {"text.chosen": "teacher", "text.rejected": "dataset", "text.teacher_sampling.temperature": 0.0}),
    ("opd", {"text.sampling.max_new_tokens": 4}),
    ("minillm", {"loss.single_step_weight": 0.0, "text.teacher_mix": 0.0, "text.sampling.max_new_tokens": 4}),
    ("seqkd", {"text.teacher_sampling.temperature": 0.0}),
    ("topk-rkl", {"loss.k": 8, "text.sampling.max_new_tokens": 4}),
    ("topk-rkl-sampled", {"loss.k": 2, "text.sampling.max_new_tokens": 4}),
    ("topk-jsd", {"loss.k": 8, "text.source": "dataset"}),
]


@pytest.mark.parametrize("protocol", ["vllm", "sglang"])
@pytest.mark.parametrize(("loss", "changes"), CASES, ids=[name for name, _ in CASES])
def test_gradients_are_those_of_the_teacher_in_memory(settings_of, served, toy, quiet, loss, changes, protocol):
    common = {"student.dropout": "off", **changes}
    live, _, _ = gradients(_local(settings_of, toy, loss, common), quiet)
    found, _, train_step = gradients(served(loss, {**common, "teacher.protocol": protocol}), quiet)
    assert isinstance(train_step.teacher, ServerTeacher)
    assert any(gradient.abs().max() > 0 for gradient in live.values())
    for name, gradient in live.items():
        torch.testing.assert_close(found[name], gradient, rtol=2e-3, atol=1e-6)
    train_step.teacher.close()


def test_the_whole_distribution_serves_every_loss_on_logits(settings_of, served, server, toy, quiet):
    server.max_logprobs = 10_000
    for loss in ("rkl", "jsd", "topk-rkl"):
        live, _, _ = gradients(_local(settings_of, toy, loss, {"student.dropout": "off"}), quiet)
        found, _, train_step = gradients(served(loss, {"student.dropout": "off", "teacher.top_k": -1}), quiet)
        for name, gradient in live.items():
            torch.testing.assert_close(found[name], gradient, rtol=2e-3, atol=1e-6)
        train_step.teacher.close()
    assert not server.asked("/inference/v1/generate")  # older servers have no ids of the caller's choice


def test_an_openai_server_gives_text_only(served, server, quiet):
    run.train(served("seqkd", {"teacher.protocol": "openai"}), console=quiet)
    assert all(isinstance(body["prompt"], str) and "top_k" not in body for body in server.asked("/v1/completions"))
    with pytest.raises(SettingsError, match="the server gives text only"):
        served("dpkd", {"teacher.protocol": "openai"})


@pytest.mark.parametrize(
    ("loss", "changes", "words"),
    [
        ("kd", {}, "kd reads whole distributions.*--offers chosen-ids"),
        ("minillm", {"text.teacher_mix": 0.0}, "minillm reads whole distributions"),
        ("hidden-mse", {}, "hidden states, which the server does not have"),
        ("opd", {"text.teacher_mix": 0.2}, "this needs the teacher's model"),
        ("topk-kl", {"loss.k": 8, "teacher.top_k": 4}, "the server has teacher.top_k=4 of them; teacher.top_k=8"),
        ("topk-kl", {"teacher.server": "localhost:8000"}, "should be an address such as http"),
        ("topk-kl", {"teacher.server": "http://me:secret@host/v1"}, "has a key or a password in the address"),
        ("topk-kl", {"teacher.store": "somewhere"}, "name either `server` or `store`"),
    ],
)
def test_what_no_server_can_do_is_refused_before_it_is_asked(served, server, loss, changes, words):
    with pytest.raises(SettingsError, match=words) as error:
        served(loss, changes)
    assert "secret" not in str(error.value).replace("secret@", "")
    assert server.requests == []


def test_a_short_form_for_the_command_line(settings_of, toy, server):
    student = {"student.init": "pretrained", "student.layers": None, "student.model": str(toy / "gpt2")}
    teacher = settings_of("opd", {**student, "teacher.model": f"{server.url}/v1"}, teacher=None).settings.teacher
    assert (teacher.servers, teacher.model, teacher.in_memory) == ([server.url], None, False)


def test_the_plan_says_what_the_server_is_asked(served, quiet):
    rows = dict(make_plan(served("topk-kl", {"loss.k": 8}), Display(quiet)).sections["models"])
    assert "toy at http://127.0.0.1" in rows["teacher"]
    assert "asked for the 8 likeliest tokens, context length 255" in rows["teacher"]


def _prepare(resolved, quiet):
    return make_plan(resolved, Display(quiet))


def test_too_small_a_limit_is_refused_with_the_command_that_starts_a_larger_one(served, quiet):
    with pytest.raises(DpkdError, match=r"need 64 log-probs.*max allowed: 20(?s:.*)vllm serve toy --max-logprobs 64"):
        _prepare(served("topk-kl"), quiet)


def test_a_wrong_model_names_what_is_served(served, quiet):
    with pytest.raises(DpkdError, match=r"has toy, not llama: set teacher.model to the right name"):
        _prepare(served("opd", {"teacher.model": "llama"}), quiet)


def test_no_server_is_one_sentence(served, quiet):
    with pytest.raises(TeacherLost, match=r"the teacher's server http://127.0.0.1:9 gives no answer: ConnectError"):
        _prepare(served("opd", {"teacher.server": "http://127.0.0.1:9/v1"}), quiet)


def test_another_tokenizer_is_found(served, server, quiet):
    def other(answer):
        for entry in answer["choices"][0].get("prompt_logprobs") or []:
            for one in (entry or {}).values():
                one["decoded_token"] = "zebra"
        return answer

    server.spoil = other
    with pytest.raises(DpkdError, match=r"another tokenizer than the student: token \d+ is 'zebra' there"):
        _prepare(served("opd"), quiet)


def test_shifted_positions_are_found(served, server, quiet):
    def shifted(answer):
        for choice in answer["choices"]:
            rows = choice.get("prompt_logprobs")
            if rows:  # every token has the numbers of the one before it
                numbers = [list(row.values())[-1]["logprob"] for row in rows[1:]]
                for row, number in zip(rows[1:], [-5.0, *numbers], strict=False):
                    list(row.values())[-1]["logprob"] = number
        return answer

    server.spoil = shifted
    with pytest.raises(DpkdError, match="Its positions are shifted"):
        _prepare(served("opd"), quiet)


def test_servers_that_differ_are_found(served, server, toy, quiet):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(toy / "teacher")
    with torch.no_grad():
        model.lm_head.weight.mul_(-1)
    other = FakeServer(model, server.tokenizer)
    with pytest.raises(DpkdError, match="they do not serve the same model"):
        _prepare(served("opd", {"teacher.server": [server.url, other.url]}), quiet)
    other.close()


def _last(answer, value):
    row = answer["choices"][0]["prompt_logprobs"][-1]
    for one in row.values():
        one["logprob"] = value
    return answer


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda a: _last(a, float("nan")), "log-probs are NaN"),
        (lambda a: _last(a, -9999.0), "-9999 or -inf"),
        (lambda a: _last(a, 3.0), "above 0, so it is no log-prob"),
        (lambda a: _last(a, "low"), "expected a log-prob, got 'low'"),
        (lambda a: {"choices": [{"prompt_logprobs": None}]}, "has no choices.0.prompt_logprobs"),
        (
            lambda a: {"choices": [{"prompt_logprobs": a["choices"][0]["prompt_logprobs"][:-1]}]},
            "expected log-probs of",
        ),
        (lambda a: {"choices": [{"prompt_logprobs": [{}] * len(a["choices"][0]["prompt_logprobs"])}]}, "are missing"),
        (lambda a: b"<html>", "answers with no JSON"),
    ],
)
def test_answers_that_cannot_be_used_are_refused_by_name(served, server, quiet, spoil, words):
    server.spoil = spoil
    with pytest.raises(DpkdError, match=words):
        _prepare(served("opd"), quiet)


def test_passing_failures_are_tried_again(settings_of, served, server, toy, quiet):
    live, _, _ = gradients(_local(settings_of, toy, "topk-kl", {"loss.k": 8, "student.dropout": "off"}), quiet)
    server.failures = [429, "drop", 503]
    found, _, train_step = gradients(
        served("topk-kl", {"loss.k": 8, "student.dropout": "off", "teacher.client.retries": 5}), quiet
    )
    for name, gradient in live.items():
        torch.testing.assert_close(found[name], gradient, rtol=2e-3, atol=1e-6)
    assert train_step.teacher.statistics()["teacher/retries"] == 3
    train_step.teacher.close()


def test_an_id_that_the_tokenizer_does_not_have_is_never_sent(served, server, quiet):
    from dpkd.api import Wants
    from dpkd.train.prepare import prepare

    teacher = prepare(served("opd"), Display(quiet)).teacher
    before = len(server.requests)
    with pytest.raises(DpkdError, match="the id 257 is not one of the 257 that the teacher's tokenizer has"):
        teacher.expect([((1, 2), (257,))], Wants(1, logps=True))
    assert len(server.requests) == before
    teacher.close()


def test_keys_come_from_the_environment_and_go_nowhere_else(served, server, quiet, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-very-secret")
    folder = run.train(served("opd", {"text.sampling.max_new_tokens": 4}), console=quiet)
    assert {h.get("Authorization") for h in server.headers} == {"Bearer sk-very-secret"}
    files = [file for file in folder.path.rglob("*") if file.is_file()]
    assert files
    assert not [file for file in files if b"sk-very-secret" in file.read_bytes()]


@pytest.mark.parametrize("status", [200, 401, 503])
def test_no_echo_of_a_key_is_shown(status, monkeypatch):
    """In a refusal, in an answer that is no JSON, and after the last retry; nor a piece of it at the cut."""
    monkeypatch.setenv("OPENAI_API_KEY", "sk-very-secret")

    def answer(request):
        text = f"{'x' * 60} sk-very-secret, or 's k - v e r y' {'x' * 180} sk-very-secret"
        return httpx.Response(status, text=text)

    client = Client(["http://teacher"], ClientSettings(retries=0))
    client.run(asyncio.sleep(0)).result()
    client._http = httpx.AsyncClient(transport=httpx.MockTransport(answer), headers=client._http.headers)
    with pytest.raises(DpkdError, match=f"{status}|no JSON") as caught:
        client.post("/v1/completions", {}).result()
    client.close()
    squeezed = "".join(str(caught.value).split())
    assert "…" in squeezed
    assert not any("sk-very-secret"[i : i + 6] in squeezed for i in range(9))


def test_requests_in_flight_are_bounded_and_shared_by_the_servers(served, server, quiet):
    other = FakeServer(server.model, server.tokenizer)
    two = {"teacher.server": [server.url, other.url], "teacher.client.in_flight": 1, "loss.k": 8, "train.steps": 4}
    run.train(served("topk-kl", two), console=quiet)
    assert len(other.asked("/v1/completions")) > 4
    assert len(server.asked("/v1/completions")) > 4
    assert server.most_in_flight + other.most_in_flight <= 4
    other.close()


def test_one_of_two_servers_may_go(served, server, quiet):
    other = FakeServer(server.model, server.tokenizer)
    resolved = served("topk-kl", {"teacher.server": [server.url, other.url], "loss.k": 8})
    from dpkd.train.prepare import prepare

    teacher = prepare(resolved, Display(quiet)).teacher
    other.close()
    from dpkd.api import Wants
    from dpkd.data.batches import TokenSequence, collate

    batch = collate([TokenSequence((1, 2), (3, 4, 5 + i)) for i in range(6)], pad_id=0)
    assert teacher.score(batch, Wants(8, logits=True)).is_finite()
    teacher.close()


def test_nothing_is_asked_twice_and_the_next_step_is_asked_for_ahead(served, server, quiet):
    folder = run.train(served("topk-kl", {"loss.k": 8, "train.steps": 12}), console=quiet)  # two epochs
    asked = [tuple(body["prompt"]) for body in server.asked("/v1/completions")]
    assert len(asked) <= len(set(asked)) + 1  # the self-test asks for its text at two k
    metrics = read_metrics(folder.metrics)
    assert {"teacher/tokens_per_second", "teacher/waited", "teacher/retries"} <= metrics[0].keys()


def test_a_server_that_dies_stops_the_run_at_a_checkpoint_from_which_it_goes_on(served, server, quiet, tmp_path):
    changes = {"loss.k": 8, "train.steps": 4, "student.dropout": "keep", "teacher.client.retries": 0}
    whole = run.train(served("topk-kl", {**changes, "output": str(tmp_path / "whole")}), console=quiet)
    resolved = served("topk-kl", {**changes, "output": str(tmp_path / "cut")})
    answers = len(server.asked("/v1/completions"))
    server.requests.clear()
    # Requests of one step may arrive after some of the next, which are sent ahead: so much later that a step is done.
    server.failures = [lambda answer: answer] * (3 * answers // 4) + [500] * 1000
    with pytest.raises(TeacherLost, match=r"training stopped: .*HTTP 500(?s:.*)dpkd train --resume"):
        run.train(resolved, console=quiet)
    assert (tmp_path / "cut" / "checkpoints").is_dir()
    server.failures = []
    resume.resume_folder(tmp_path / "cut", console=quiet)
    for file in ("model.safetensors",):
        own, other = ((f / "model" / file).read_bytes() for f in (tmp_path / "cut", whole.path))
        assert own == other


def test_a_store_is_filled_by_a_server_and_a_later_run_needs_none(settings_of, served, server, toy, quiet, tmp_path):
    resolved = served("topk-kl", {"loss.k": 8})
    manifest = cache(resolved, tmp_path / "store", dtype="float32", console=quiet)
    assert (manifest.kind, manifest.k) == ("topk", 8)
    common = {"loss.k": 8, "student.dropout": "off"}
    live, _, _ = gradients(_local(settings_of, toy, "topk-kl", common), quiet)
    server.close()
    student = {"student.init": "pretrained", "student.layers": None, "student.model": str(toy / "gpt2")}
    stored = settings_of("topk-kl", {**student, **common, "teacher.store": str(tmp_path / "store")}, teacher=None)
    found, _, train_step = gradients(stored, quiet)
    assert isinstance(train_step.teacher, StoreTeacher)
    for name, gradient in live.items():
        torch.testing.assert_close(found[name], gradient, rtol=2e-3, atol=1e-6)


def test_rows_spread_the_rest_over_the_tokens_that_are_not_known():
    """By hand: of 5 tokens, ids 1 and 3 were asked for and 3 was given; 0.2 of the mass is left for 0, 2 and 4."""
    import numpy as np

    from dpkd.api import Wants
    from dpkd.teachers.server.protocols import ServedScores
    from dpkd.teachers.server.teacher import served_rows

    one = ServedScores(np.log([0.3]), np.array([[1, 3]]), np.log([[0.5, 0.3]]))
    rows = served_rows([one], torch.tensor([3]), Wants(8), 5)
    expected = [[0.2 / 3, 0.5, 0.2 / 3, 0.3, 0.2 / 3]]
    np.testing.assert_allclose(rows.logits(slice(None)).exp(), expected, rtol=1e-6)
    padded = ServedScores(np.log([0.3]), np.array([[1, 7]]), np.log([[0.5, 0.1]]))  # the head has an id 7: no token
    rows = served_rows([padded], torch.tensor([3]), Wants(8), 5)
    np.testing.assert_allclose(rows.logits(slice(None)).exp(), expected, rtol=1e-6)
    assert math.isclose(rows.logps()[0].exp(), 0.3, rel_tol=1e-6)


def test_chosen_ids_need_a_server_that_scores_them(served, server, quiet):
    server.has_chosen_ids = False
    with pytest.raises(DpkdError, match=r"need 16 chosen ids of the teacher(?s:.*)--enable-scale-out"):
        _prepare(served("topk-rkl"), quiet)


@pytest.mark.parametrize("protocol", ["vllm", "sglang", "openai"])
def test_a_file_of_text_is_the_models_own(served, server, toy, tmp_path, protocol):
    """Greedy text by a server, as by the model in this process."""
    from dpkd.api import SamplingSettings
    from dpkd.data.settings import DataSettings
    from dpkd.models.settings import ModelSettings, TeacherSettings
    from dpkd.plugins import load_registry
    from dpkd.rollout.sample_file import sample_to_file

    settings = SamplingSettings(temperature=0.0, max_new_tokens=6)
    data, tokenizer = DataSettings(path=str(toy / "data.jsonl"), limit=5), str(toy / "teacher")
    of = TeacherSettings(server=server.url, protocol=protocol, tokenizer=tokenizer)
    files = tmp_path / "served.jsonl", tmp_path / "own.jsonl"
    for model, file in zip((of, ModelSettings(model=tokenizer)), files, strict=True):
        sample_to_file(model, data, settings, registry=load_registry(), output=file, seed=1)
    own, other = ([json.loads(line) for line in file.read_text().splitlines()] for file in files)
    assert own == other
    assert len(own) == 5


def test_the_settings_of_a_run_are_those_that_were_given(served, quiet):
    folder = run.train(served("opd", {"text.sampling.max_new_tokens": 4}), console=quiet)
    facts = json.loads(folder.facts.read_text())
    assert facts["models"]["teacher"] == "server:vllm:toy"
