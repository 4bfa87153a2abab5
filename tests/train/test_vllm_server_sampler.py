"""The sampler `vllm-server`: a server loads the saved adapters under a new name, and what it draws is the student's.

The server is the tests' own; `tests/train/test_vllm_server.py` has vLLM itself.
"""

from __future__ import annotations

import pytest
import torch
from fake_teacher_server import FakeServer
from transformers import AutoModelForCausalLM, AutoTokenizer

from dpkd.api import GenerationModel, SamplingTask
from dpkd.errors import DpkdError
from dpkd.models.lora import add_lora
from dpkd.models.settings import LoraSettings
from dpkd.rollout.backends.vllm_server import VllmServerConfig, VllmServerSampler
from dpkd.run_metrics import read_metrics
from dpkd.train import run

PROMPTS = [[5, 6, 7], [8]]


@pytest.fixture
def server(toy):
    one = FakeServer(
        AutoModelForCausalLM.from_pretrained(toy / "teacher"), AutoTokenizer.from_pretrained(toy / "teacher")
    )
    one.adapters = {}
    yield one
    one.close()


@pytest.fixture
def student(toy):
    model = add_lora(AutoModelForCausalLM.from_pretrained(toy / "teacher"), LoraSettings(r=2)).eval()
    _move(model)
    return model


def _move(model):
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.3)


def _sampler(server, model, tmp_path):
    writer = GenerationModel(model, 257, frozenset({256}), 256, longest=64)
    return VllmServerSampler(writer, VllmServerConfig(server=server.url, folder=str(tmp_path), dtype="float32"))


def _own(model, prompt, ids):
    with torch.no_grad():
        logits = model(torch.tensor([[*prompt, *ids]])).logits[0, len(prompt) - 1 : -1].double()
    return logits.log_softmax(-1).gather(-1, torch.tensor(ids)[:, None])[:, 0].float()


def test_what_is_drawn_follows_the_adapters(server, student, tmp_path):
    sampler, names = _sampler(server, student, tmp_path), set()
    task = SamplingTask(PROMPTS, seeds=range(4), num_generations=2, max_new_tokens=5)
    for _ in range(2):
        sampler.refresh()
        drawn = sampler.draw(task)
        assert len(drawn) == 4
        for place, one in enumerate(drawn):
            expected = _own(student, PROMPTS[place // 2], one.response_ids)
            torch.testing.assert_close(one.logps, expected, atol=1e-4, rtol=1e-4)
            assert one.truncated == (one.response_ids[-1] != 256)
        assert len(server.adapters) == 1
        names |= set(server.adapters)
        _move(student)
    assert len(names) == 2  # a name of its own each time: no cached prefix is of older adapters
    sampler.close()
    assert server.adapters == {}
    assert list(tmp_path.iterdir()) == []


def test_adapters_that_the_server_did_not_take_over_are_found(server, student, tmp_path):
    sampler = _sampler(server, student, tmp_path)
    sampler.refresh()
    _move(student)
    with pytest.raises(DpkdError, match="its engine did not take over all weights"):
        sampler.draw(SamplingTask(PROMPTS, seeds=range(2), max_new_tokens=8))
    sampler.close()


def test_what_is_missing_is_said(server, student, toy, tmp_path):
    server.adapters = None
    sampler = _sampler(server, student, tmp_path)
    with pytest.raises(DpkdError, match="VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 vllm serve"):
        sampler.refresh()
    sampler.close()
    with pytest.raises(DpkdError, match=r"reloads adapters and no whole models: --set student.lora.r=16"):
        _sampler(server, AutoModelForCausalLM.from_pretrained(toy / "teacher"), tmp_path)


def test_a_run_of_pairs_has_the_teachers_text_drawn_in_this_process(server, settings_of, toy, quiet, tmp_path):
    changes = {
        "student.init": "pretrained",
        "student.layers": None,
        "student.model": str(toy / "teacher"),
        "student.lora": {"r": 2},
        "text.backend": "vllm-server",
        "text.backend_settings": {"server": server.url, "folder": str(tmp_path / "adapters"), "dtype": "float32"},
    }
    (tmp_path / "adapters").mkdir()
    folder = run.train(settings_of("dpkd", changes), console=quiet)
    assert all(line["length/rejected"] > 1 and line["length/chosen"] > 1 for line in read_metrics(folder.metrics))
    assert server.adapters == {}
