"""`teacher.quantization`: real packed weights on the CPU, in every path that reads a teacher."""

from __future__ import annotations

import re
from importlib.util import find_spec

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from dpkd.errors import DpkdError, SettingsError
from dpkd.models.fingerprint import fingerprint_of
from dpkd.models.loading import load_model
from dpkd.models.lora import add_lora
from dpkd.models.quantization import quantization_of, weight_bytes
from dpkd.models.saving import save_model
from dpkd.models.settings import ModelSettings, StudentSettings, TeacherSettings
from dpkd.models.student_init import student_config
from dpkd.run_metrics import read_metrics
from dpkd.train import run
from dpkd.train.cache import cache
from dpkd.train.plan import make_plan
from dpkd.train.progress import Display

GPT2 = {"student.init": "pretrained", "student.layers": None}
KINDS = ["8bit", "4bit"]
needs_bitsandbytes = pytest.mark.skipif(
    find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed: pip install 'dpkd[quant]'"
)


@pytest.fixture(scope="module")
def wide(toy, tmp_path_factory):
    """A Llama whose matrices are as wide as a block of NF4, 64 numbers, with the toy's tokenizer."""
    folder = tmp_path_factory.mktemp("wide")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=257,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=128,
        bos_token_id=256,
        eos_token_id=256,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(toy / "teacher").save_pretrained(folder)
    return folder


@pytest.fixture
def changes(toy, wide):
    return {**GPT2, "student.model": str(toy / "gpt2"), "teacher.model": str(wide)}


@needs_bitsandbytes
@pytest.mark.parametrize("kind", KINDS)
def test_packed_weights_are_small_and_near_the_model(kind, wide):
    """The size is counted by hand: one byte, or half a byte, for each number of a layer's matrices."""
    plain, packed = (
        load_model(TeacherSettings(model=str(wide), quantization=q), device="cpu", dtype=torch.float32)
        for q in ("none", kind)
    )
    layers = [m.weight.numel() for n, m in plain.named_modules() if isinstance(m, torch.nn.Linear) and n != "lm_head"]
    held = sum(p.numel() * p.element_size() for n, p in packed.named_parameters() if re.search(r"(proj)\.weight$", n))
    assert held == sum(layers) * {"8bit": 1.0, "4bit": 0.5}[kind]
    assert packed.get_output_embeddings().weight.dtype == torch.float32
    assert not packed.training
    ids = torch.arange(40).reshape(2, 20)
    with torch.no_grad():
        exact, near = (model(ids).logits.log_softmax(-1) for model in (plain, packed))
    assert 0 < (exact - near).abs().mean() < {"8bit": 0.05, "4bit": 0.5}[kind]


@needs_bitsandbytes
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("loss", "more"),
    [("kd", {}), ("dpkd", {}), ("minillm", {"text.teacher_mix": 0.2}), ("seqkd", {}), ("dpo", {})],
    ids=["rows", "logps-and-text", "rollouts-and-mix", "text", "reference"],
)
def test_every_path_reads_a_packed_teacher(kind, loss, more, settings_of, changes, quiet):
    folder = run.train(
        settings_of(loss, {**changes, **more, "teacher.quantization": kind}, teacher=None), console=quiet
    )
    lines = read_metrics(folder.metrics)
    assert len(lines) == 2
    assert all(torch.isfinite(torch.tensor(line["loss/main"])) for line in lines)


@needs_bitsandbytes
def test_a_store_can_be_written_by_a_packed_teacher(settings_of, changes, quiet, tmp_path):
    fixed = {"text.rejected": "dataset", "teacher.quantization": "4bit"}
    settings = settings_of("dpkd", {**changes, **fixed}, teacher=None)
    manifest = cache(settings, tmp_path / "store", console=quiet)
    assert manifest.model.endswith("/4bit")


def test_packed_weights_make_another_teacher(toy):
    plain, packed = (TeacherSettings(model=str(toy / "teacher"), quantization=q) for q in ("none", "4bit"))
    assert fingerprint_of(packed) == f"{fingerprint_of(plain)}/4bit"
    assert fingerprint_of(ModelSettings(model=str(toy / "teacher"))) == fingerprint_of(plain)
    assert (quantization_of(packed), quantization_of(plain)) == ("4bit", None)


def test_the_plan_counts_packed_weights_but_not_embeddings_and_head(settings_of, changes, quiet):
    config = LlamaConfig(vocab_size=100, hidden_size=8, num_attention_heads=2, tie_word_embeddings=False)
    assert weight_bytes(config, 10_000, 4, None) == 40_000
    assert weight_bytes(config, 10_000, 4, "8bit") == 4 * 1600 + 8400
    assert weight_bytes(config, 10_000, 2, "4bit") == 2 * 1600 + 4200
    if find_spec("bitsandbytes") is not None:
        plan = make_plan(settings_of("kd", {**changes, "teacher.quantization": "4bit"}, teacher=None), Display(quiet))
        assert dict(plan.sections["models"])["teacher"].endswith("weights in 4bit")


def test_without_the_package_it_says_what_to_install_before_anything_slow(settings_of, changes, quiet, monkeypatch):
    monkeypatch.setattr("dpkd.models.quantization.find_spec", lambda name: None)
    with pytest.raises(DpkdError, match=re.escape("pip install 'dpkd[quant]'")):
        make_plan(settings_of("kd", {**changes, "teacher.quantization": "8bit"}, teacher=None), Display(quiet))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"teacher.quantization": "2bit"}, "teacher.quantization"),
        ({"teacher.model": "some.gguf"}, "takes a folder of safetensors or a hub id"),
        ({"student.init": "layers", "student.model": None, "student.layers": 2}, "8bit quantizes the weights, but"),
    ],
)
def test_what_cannot_be_packed_is_refused(more, message, settings_of, changes):
    given = {**changes, "teacher.quantization": "8bit", **more}
    with pytest.raises(SettingsError, match=re.escape(message)):
        settings_of("kd", given, teacher=None)


def test_a_store_has_nothing_to_pack(settings_of, changes, tmp_path):
    with pytest.raises(SettingsError, match="packs the weights of a model, and a `store` has none"):
        settings_of("kd", {**GPT2, "teacher.quantization": "8bit", "teacher.store": str(tmp_path)}, teacher=None)


@needs_bitsandbytes
def test_a_fresh_student_of_its_shape_is_not_packed(settings_of, quiet, wide):
    fresh = {"teacher.model": str(wide), "student.init": "random", "student.layers": 2, "teacher.quantization": "4bit"}
    folder = run.train(settings_of("kd", fresh, teacher=None), console=quiet)
    model = AutoModelForCausalLM.from_pretrained(folder.model)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    config = LlamaConfig()
    config.quantization_config = {"bits": 4}
    assert not hasattr(student_config(StudentSettings(init="random"), config), "quantization_config")
    assert config.quantization_config


QLORA = {"student.lora": {"r": 4, "alpha": 8}, "student.init": "pretrained", "student.layers": None}


def _adapted(folder, kind, device="cpu"):
    """A packed student with adapters that are not zero."""
    settings = StudentSettings(model=str(folder), quantization=kind, lora={"r": 4})
    model = add_lora(load_model(settings, device=device, dtype=torch.float32), settings.lora)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn_like(parameter) * 0.1)
    return model.eval()


@needs_bitsandbytes
@pytest.mark.parametrize("kind", KINDS)
def test_the_saved_student_is_the_unpacked_weights_plus_the_adapters(kind, wide, toy, tmp_path):
    """To rounding: packed again after the sum, the model would be as far off as the packing."""
    model = _adapted(wide, kind)
    save_model(model, AutoTokenizer.from_pretrained(wide), tmp_path / "model")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert {p.dtype for p in plain.parameters()} == {torch.float32}
    assert not hasattr(plain.config, "quantization_config")
    ids = torch.arange(40).reshape(2, 20)
    with torch.no_grad():
        ours, theirs = plain(ids).logits, model(ids).logits
        with model.disable_adapter():
            untrained = model(ids).logits
    tolerance = {"4bit": 0.02, "8bit": 0.1}[kind]  # what computes with packed weights rounds more
    assert (ours - theirs).abs().max() < tolerance
    assert (ours - untrained).abs().max() > 4 * tolerance
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()


@needs_bitsandbytes
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("loss", ["kd", "dpo", "gkd"], ids=["rows", "reference", "own-text"])
def test_adapters_are_trained_on_packed_weights(kind, loss, settings_of, wide, quiet):
    changes = {**QLORA, "student.model": str(wide), "student.quantization": kind}
    folder = run.train(settings_of(loss, changes, teacher="teacher"), console=quiet)
    assert all(torch.isfinite(torch.tensor(line["loss/main"])) for line in read_metrics(folder.metrics))
    assert {p.dtype for p in AutoModelForCausalLM.from_pretrained(folder.model).parameters()} == {torch.float32}


def _adapter_gradients(model, ids):
    model.train()
    logits = model(ids).logits
    (logits * torch.arange(logits.numel()).sin().view_as(logits)).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if "lora_" in name}


@needs_bitsandbytes
def test_adapters_have_the_gradient_of_the_unpacked_weights(wide):
    """Also after an inference, for which a CPU's kernel may lay the weights out anew."""
    from bitsandbytes.functional import dequantize_4bit

    ids = torch.arange(20).reshape(1, 20)
    packed, plain = _adapted(wide, "4bit"), _adapted(wide, "none")
    with torch.no_grad():
        packed(ids)
        for name, module in packed.named_modules():
            if type(module).__name__ == "Linear4bit":
                weight = dequantize_4bit(module.weight.data, module.weight.quant_state)
                plain.get_submodule(name).weight.copy_(weight)
    ours, theirs = (_adapter_gradients(model, ids) for model in (packed, plain))
    assert len(ours) == len(theirs) > 10
    for name, grad in theirs.items():
        assert grad.abs().max() > 0
        torch.testing.assert_close(ours[name], grad, rtol=0, atol=1e-4 * float(grad.abs().max()))


@needs_bitsandbytes
def test_where_no_gradient_passes_packed_weights_that_is_a_sentence(wide, monkeypatch):
    import bitsandbytes

    forward = bitsandbytes.nn.Linear4bit.forward
    monkeypatch.setattr(bitsandbytes.nn.Linear4bit, "forward", lambda self, x: forward(self, x.detach()))
    settings = StudentSettings(model=str(wide), quantization="4bit", lora={})
    with pytest.raises(
        DpkdError, match=r"student\.quantization=4bit does not work .*\(no gradient passes through packed"
    ):
        load_model(settings, device="cpu", dtype=torch.float32)


@needs_bitsandbytes
def test_a_device_that_cannot_read_packed_weights_is_a_sentence(wide, monkeypatch):
    from transformers import AutoModelForCausalLM as Auto

    def refuse(**options):
        raise RuntimeError("no kernel for this device\nmore")

    monkeypatch.setattr(Auto, "from_pretrained", refuse)
    settings = StudentSettings(model=str(wide), quantization="4bit", lora={})
    with pytest.raises(DpkdError, match=r"student\.quantization=4bit does not work on this machine's cpu .*no kernel"):
        load_model(settings, device="cpu", dtype=torch.float32)


@needs_bitsandbytes
def test_sizes_that_a_kernel_cannot_compute_are_a_sentence_before_the_run(wide, monkeypatch):
    import bitsandbytes

    def refuse(self, x):
        raise AssertionError("N must be divisible by block_n")

    monkeypatch.setattr(bitsandbytes.nn.Linear4bit, "forward", refuse)
    settings = TeacherSettings(model=str(wide), quantization="4bit")
    with pytest.raises(DpkdError, match=r"teacher\.quantization=4bit does not work on .* \(N must be divisible"):
        load_model(settings, device="cpu", dtype=torch.float32)


@pytest.mark.parametrize("more", [{"student.lora": None}, {"student.init": "random"}])
def test_packed_weights_of_a_student_need_adapters(more, settings_of, wide):
    with pytest.raises(SettingsError, match="packs weights that stay frozen, so the student needs adapters"):
        settings_of("kd", {**QLORA, "student.model": str(wide), "student.quantization": "4bit", **more})
