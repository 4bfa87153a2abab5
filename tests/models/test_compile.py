"""Compiled layers and losses: the same numbers, nothing new for a new length, and never the end of a run."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch

from dpkd.api import LossSpec, Signal
from dpkd.data.batches import PLAIN, TokenSequence, collate
from dpkd.models import compile as compiling
from dpkd.models.head import hidden_rows
from dpkd.plugins import load_registry
from dpkd.train.memory_trace import sample_inputs

# The compiler's own words are not ours to mend.
pytestmark = [pytest.mark.filterwarnings("ignore")]


class Counting:
    """The eager backend, which counts what it is given."""

    def __init__(self):
        self.graphs = 0

    def __call__(self, graph, _inputs):
        self.graphs += 1
        return graph.forward


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def make(kind, layers=3):
    import transformers as t

    off = {"attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0}
    config = {
        "gpt2": lambda: t.GPT2Config(n_layer=layers, n_embd=32, n_head=4, vocab_size=64, n_positions=64, **off),
        "qwen2": lambda: t.Qwen2Config(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=2,
        ),
    }[kind]()
    torch.manual_seed(0)
    return t.AutoModelForCausalLM.from_config(config)


def batch(rows, tokens):
    return collate([TokenSequence((4, 5, 6), tuple(range(7, 7 + tokens - i))) for i in range(rows)], pad_id=0)


@pytest.mark.parametrize("kind", ["gpt2", "qwen2"])
def test_new_lengths_compile_nothing_and_layers_share_one_code(kind):
    model, backend = make(kind).train(), Counting()
    names = list(model.state_dict())
    expected = [hidden_rows(model, batch(*shape)).detach() for shape in ((2, 9), (3, 12), (5, 7), (4, 20))]
    assert compiling.compile_blocks(model, backend) == 3
    assert list(model.state_dict()) == names
    found = []
    for number, shape in enumerate(((2, 9), (3, 12), (5, 7), (4, 20))):
        hidden = hidden_rows(model, batch(*shape))
        hidden.sum().backward()
        found.append(hidden.detach())
        if number == 0:
            first = backend.graphs
    assert backend.graphs == first
    assert first <= 2  # not one for each layer
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_what_a_compiler_gets_wrong_is_undone(monkeypatch):
    model = make("gpt2")
    expected = hidden_rows(model, batch(2, 5))

    def wrong(graph, _inputs):
        return lambda *values: tuple(v * 2 if isinstance(v, torch.Tensor) else v for v in graph.forward(*values))

    monkeypatch.setattr(compiling, "BACKEND", wrong)
    reason = compiling.compile_checked(model)
    assert reason is not None
    assert "numbers change" in reason
    assert torch.equal(hidden_rows(model, batch(2, 5)), expected)


def test_a_compiler_that_fails_is_no_reason_to_stop(monkeypatch):
    def fails(_graph, _inputs):
        raise RuntimeError("no compiler")

    monkeypatch.setattr(compiling, "BACKEND", fails)
    model = make("gpt2")
    assert "no compiler" in str(compiling.compile_checked(model))
    hidden_rows(model, batch(2, 5))


READS = frozenset({Signal.STUDENT_LOGITS, Signal.TEACHER_LOGITS, Signal.TARGETS})


def test_a_loss_is_one_graph_for_any_number_of_rows(monkeypatch):
    backend = Counting()
    monkeypatch.setattr(compiling, "BACKEND", backend)
    spec = load_registry().get(LossSpec, "jsd").spec
    loss, plain = spec.loss(spec.config()), spec.loss(spec.config())
    reads = spec.signals(spec.config())
    inputs = lambda: sample_inputs(READS, vocabulary=32)[1]  # noqa: E731
    assert compiling.compile_loss(loss, lambda: inputs().only(reads)) is None
    first, x = backend.graphs, inputs()
    for rows in (3, 5, 7):
        part = type(x)({signal: x[signal][:rows].detach() for signal in READS})
        torch.testing.assert_close(loss(part.only(reads)), plain(part.only(reads)))
    assert backend.graphs <= first + 1  # inputs without a gradient are others


class Looks(torch.nn.Module):
    """A loss whose next operator depends on a value."""

    def forward(self, x):
        log_q = x.student_log_probs()
        return log_q.logsumexp(-1) if bool((log_q > -1.0).any()) else log_q.amax(-1)


def test_a_loss_that_looks_at_values_is_said_to_be_no_graph():
    _, x = sample_inputs(READS, vocabulary=1024)
    assert compiling.why_no_graph(Looks(), x) is not None
    spec = load_registry().get(LossSpec, "akl").spec
    assert compiling.why_no_graph(spec.loss(spec.config()), x.only(spec.signals(spec.config()))) is None


@pytest.mark.parametrize("kind", ["gpt2", "qwen2"])
def test_the_gradient_that_is_compared_survives_half_precision(kind):
    """A comparison whose gradient is all rounding would refuse what compiles well."""
    model = make(kind, layers=8)
    exact = compiling._probe(model, nullcontext, [PLAIN])
    rounded = compiling._probe(model, lambda: torch.autocast("cpu", torch.bfloat16), [PLAIN])
    assert exact[1].abs().max() > 1e-3
    assert max(compiling._gaps(rounded, exact)) < 0.1


@pytest.mark.parametrize(("noise", "reason"), [(0.1, None), (0.01, "its numbers change (by 0.25)")])
def test_what_a_rounding_changes_is_the_measure_of_what_compiling_may_change(noise, reason, monkeypatch):
    """A trained model in half precision turns one rounding into tenths of a gradient."""
    probes = iter([1.0, 1.0, 1.0, 1.0 + noise, 1.25])  # twice as it is, in the mode compared, rounded, compiled
    monkeypatch.setattr(compiling, "_probe", lambda *_: [torch.tensor([next(probes)])])
    monkeypatch.setattr(compiling, "BACKEND", "eager")
    assert compiling.compile_checked(make("gpt2")) == reason


def test_rounded_embeddings_differ_by_one_rounding_and_only_inside_the_block():
    model = make("qwen2")
    ids = torch.arange(8)
    plain = model.get_input_embeddings()(ids)
    with compiling._rounded_embeddings(model, lambda: torch.autocast("cpu", torch.bfloat16)):
        rounded = model.get_input_embeddings()(ids)
    torch.testing.assert_close((rounded / plain - 1).abs(), torch.full_like(plain, 2.0**-7), rtol=1e-3, atol=0)
    assert torch.equal(model.get_input_embeddings()(ids), plain)


def test_parts_of_a_model_keep_their_modes(monkeypatch):
    monkeypatch.setattr(compiling, "BACKEND", "eager")
    model = make("gpt2").train()
    still = compiling.repeated_blocks(model)[0].eval()
    assert compiling.compile_checked(model) is None
    assert model.training
    assert not still.training
