"""Recorded passes of a backbone: the same hidden states and gradients, from fixed memory, and never the end of a run.

A CPU records no graph: a replay is the function itself, over the same fixed memory and the same buffers.
"""

from __future__ import annotations

import gc
from copy import deepcopy

import pytest
import torch
from peft import LoraConfig, get_peft_model

from dpkd import functional
from dpkd.data.batches import Layout, TokenSequence, collate
from dpkd.models import captured as capturing
from dpkd.models.captured import Recorder, capture, captured, paused, release
from dpkd.models.compile import compile_blocks
from dpkd.models.head import causal_lm, head_of, hidden_rows
from dpkd.models.layers import layer_rows
from dpkd.models.student_init import recompute_activations
from tests.models.test_compile import Counting, make

pytestmark = [
    pytest.mark.usefixtures("far_device"),
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing"),  # peft asks by the old name
]


@pytest.fixture
def far_device(monkeypatch):
    """A device that is not free to read: attention takes no mask for plain rows, as on a GPU."""
    monkeypatch.setattr(functional, "free_to_read", lambda device: False)


PADDED = Layout(columns=8)


def batch(rows=3, tokens=6, layout=PADDED):
    sequences = [TokenSequence((4, 5, 6), tuple(range(7 + i, 7 + tokens))) for i in range(rows)]
    return collate(sequences, pad_id=0, layout=layout)


def step(model, batches):
    """The summed gradients of some micro-batches, as a step leaves them, and their hidden states."""
    model.zero_grad(set_to_none=True)
    hidden = []
    for one in batches:
        rows = hidden_rows(model, one)
        head = head_of(model)
        (head.logits(rows).log_softmax(-1).gather(1, one.targets[:, None]).sum() + rows.sin().sum()).backward()
        hidden.append(rows.detach().clone())
    return hidden, {n: None if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}


def assert_same(one, other):
    for a, b in zip(one[0], other[0], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    assert one[1].keys() == other[1].keys()
    for name, grad in one[1].items():
        assert (grad is None) == (other[1][name] is None), name
        if grad is not None:
            torch.testing.assert_close(grad, other[1][name], rtol=1e-10, atol=1e-12)


def lora(model):
    return get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False))


CASES = {
    "tied embeddings": lambda: make("gpt2"),
    "grouped queries": lambda: make("qwen2"),
    "adapters": lambda: lora(make("qwen2")),
    "some weights frozen": lambda: make("qwen2"),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("layout", [PADDED, PADDED._replace(shared=True)], ids=["plain", "shared"])
def test_hidden_states_and_gradients_are_those_of_the_model(case, layout):
    """Over steps of several micro-batches, of several shapes."""
    model, said = CASES[case]().double(), []
    if case == "some weights frozen":
        model.model.embed_tokens.requires_grad_(False)
        model.model.layers[0].requires_grad_(False)
    steps = [
        [batch(3, 6, layout), batch(2, 5, layout)],
        [batch(2, 12, layout), batch(3, 6, layout), batch(3, 5, layout)],
        [batch(2, 5, layout), batch(3, 6, layout), batch(3, 20, layout)],
    ]
    expected = [step(model, batches) for batches in steps]
    capture(causal_lm(model), said.append)
    for batches, of_step in zip(steps, expected, strict=True):
        assert_same(step(model, batches), of_step)
    shapes = {one.input_ids.shape for batches in steps for one in batches}
    assert len(captured(causal_lm(model).base_model)._passes) == len(shapes) > 2
    assert not said


def test_a_pass_without_a_gradient_is_recorded_apart():
    model, said = make("qwen2").double().eval(), []
    expected = hidden_rows(model, batch()).detach()
    capture(model, said.append)
    for _ in range(3):
        with torch.no_grad():
            found = hidden_rows(model, batch())
        torch.testing.assert_close(found, expected)
        assert not found.requires_grad
        assert hidden_rows(model, batch()).requires_grad
    assert len(captured(model.base_model)._passes) == 2
    assert not said


def test_weights_that_changed_in_place_are_seen_and_moved_ones_are_recorded_again():
    model = make("qwen2").double()
    capture(model, pytest.fail)
    for _ in range(3):
        step(model, [batch()])
    graphs = captured(model.base_model)
    (first,) = graphs._passes.values()
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.mul_(2.0)
    found = step(model, [batch()])
    assert [*graphs._passes.values()] == [first]
    with paused(model):
        assert_same(found, step(model, [batch()]))
    weight = model.model.layers[0].mlp.up_proj.weight
    weight.data = weight.detach() * 3.0
    found = step(model, [batch()])
    assert [*graphs._passes.values()] != [first]
    with paused(model):
        assert_same(found, step(model, [batch()]))


def test_autocast_makes_its_copies_of_weights_in_every_pass():
    model = make("qwen2")
    capture(model, pytest.fail)
    for _ in range(3):
        with torch.autocast("cpu", torch.bfloat16):
            hidden_rows(model, batch())
            found = hidden_rows(model, batch())
            with torch.no_grad():
                model.model.layers[0].mlp.up_proj.weight.mul_(1.5)
            changed = hidden_rows(model, batch())
        assert not torch.equal(found, changed)


@pytest.mark.parametrize("problem", ["reads", "fails", "differs"])
def test_a_model_that_cannot_be_recorded_runs_as_it_is_and_one_line_says_why(problem, monkeypatch):
    model, said = make("qwen2").double(), []
    expected = step(model, [batch(), batch(2)])
    handle = None
    if problem == "reads":
        handle = model.model.layers[1].register_forward_hook(lambda module, given, output: output.sum().item() and None)
    elif problem == "fails":

        def refuse(self, function):
            raise RuntimeError("CUDA error: operation not permitted when stream is capturing\nmore")

        monkeypatch.setattr(Recorder, "record", refuse)
    else:

        def wrong(self, function):
            return lambda: (function(), function.__self__.hidden.data.mul_(2))

        monkeypatch.setattr(Recorder, "record", wrong)
    monkeypatch.setattr(capturing, "MOST_FAILURES", 2)
    capture(model, said.append)
    for _ in range(3):
        assert_same(step(model, [batch(), batch(2)]), expected)
    words = {"reads": "reads values on the host", "fails": "not permitted", "differs": "its numbers change"}
    (line,) = said
    assert line.startswith("no CUDA graphs of Qwen2Model: ")
    assert words[problem] in line
    assert "\n" not in line
    if handle is not None:
        handle.remove()


def test_one_recording_that_breaks_is_tried_again_and_a_shape_that_fails_leaves_the_others(monkeypatch):
    """The first attempt at a shape may fail, or both: the others go on being recorded."""
    model, said, tries = make("qwen2").double(), [], []
    shapes = [batch(), batch(2), batch(1)]
    expected = step(model, shapes)
    real = Recorder.record

    def record(self, function):
        rows = function.__self__._inputs.input_ids.shape[0]
        tries.append(rows)
        if rows == 2 or (rows == 1 and tries.count(1) == 1):
            raise RuntimeError("beginAllocateToPool: already recording to mempool_id")
        return real(self, function)

    monkeypatch.setattr(Recorder, "record", record)
    capture(model, said.append)
    for _ in range(2):
        assert_same(step(model, shapes), expected)
    recorder = captured(causal_lm(model).base_model)
    assert said == []
    assert not recorder.paused
    assert {shape[1][0][0] for shape in recorder._passes} == {1, 3}
    assert tries.count(2) == 2  # as it comes, checked, and then never again


@pytest.mark.skipif(not torch.cuda.is_available(), reason="records on a GPU alone")
def test_memory_can_be_recorded_into_after_a_recording_broke():
    recorder, x = Recorder(torch.device("cuda")), torch.ones(4, device="cuda")
    with pytest.raises(RuntimeError):
        recorder.record(lambda: x.sum().item())
    recorder.record(lambda: x.add_(1))()
    assert x.tolist() == [2.0] * 4


def test_nothing_is_collected_while_a_graph_is_recorded():
    from dpkd.models.cuda_graphs import _nothing_collected

    for collects in (True, False):
        (gc.enable if collects else gc.disable)()
        try:
            with _nothing_collected():
                assert not gc.isenabled()
            assert gc.isenabled() == collects
        finally:
            gc.enable()


@pytest.mark.parametrize("fails", [False, True])
def test_another_kind_of_pass_in_the_middle_of_a_step_spoils_no_gradient(fails, monkeypatch):
    """The check of its first passes uses the buffers, in which gradients of the step are already."""
    model, said = make("qwen2").double(), []
    step_batches = [batch(), batch(3, 6, PADDED._replace(shared=True)), batch(2)]
    expected = step(model, step_batches)
    capture(model, said.append)
    step(model, [batch()])
    monkeypatch.setattr(capturing, "MOST_FAILURES", 1)
    if fails:
        computed = capturing.RecordedPasses._computed
        calls = iter((0, 1))
        monkeypatch.setattr(capturing.RecordedPasses, "_computed", lambda self: computed(self)[: 1 - next(calls)])
    assert_same(step(model, step_batches), expected)
    assert len(said) == fails


@pytest.mark.filterwarnings("ignore")  # the compiler's own
def test_compiled_layers_are_recorded_as_they_are_compiled():
    """Each shape is run once before it is recorded, so that nothing is compiled in a recording."""
    torch._dynamo.reset()
    model, counting = make("qwen2").double(), Counting()
    steps = [[batch(3, 6), batch(2, 5)], [batch(2, 12), batch(3, 6)], [batch(2, 12), batch(3, 20)]]
    expected = [step(model, batches) for batches in steps]
    compile_blocks(model, counting)
    capture(model, pytest.fail)
    for batches, of_step in zip(steps, expected, strict=True):
        assert_same(step(model, batches), of_step)
    passes = captured(model.base_model)._passes
    assert len(passes) == 4
    assert counting.graphs >= 1
    torch._dynamo.reset()


def test_few_shapes_are_recorded(monkeypatch):
    monkeypatch.setattr(capturing, "MOST", 2)
    model = make("qwen2").double()
    capture(model, pytest.fail)
    for rows in (1, 2, 3, 1, 2, 3):
        step(model, [batch(rows)])
    assert len(captured(model.base_model)._passes) == 2


@pytest.mark.parametrize("steps", [1, 3])
def test_dropout_draws_the_same_numbers(steps):
    """Recording uses none up: as many have been drawn afterwards."""
    found = []
    for with_graphs in (False, True):
        model = make("gpt2").double().train()
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.2
        if with_graphs:
            capture(model, pytest.fail)
        torch.manual_seed(3)
        taken = [step(model, [batch(), batch(2)]) for _ in range(steps)]
        found.append((taken, torch.rand(4)))
    (one, after_one), (other, after_other) = found
    for a, b in zip(one, other, strict=True):
        assert_same(a, b)
    assert torch.equal(after_one, after_other)
    if steps > 1:
        assert not torch.equal(one[0][0][0], one[1][0][0])


def test_a_model_that_computes_activations_again_is_left_alone():
    model = make("qwen2")
    recompute_activations(model, selective=False)
    capture(model.train(), pytest.fail)
    assert captured(model.base_model) is None


def test_a_released_model_runs_as_it_is():
    model = make("qwen2")
    capture(model, pytest.fail)
    assert captured(model.base_model) is not None
    release(model)
    assert captured(model.base_model) is None


def test_a_copy_of_a_model_records_nothing():
    """As the copy in bfloat16 that draws text, and the reference."""
    model = make("qwen2").double()
    capture(model, pytest.fail)
    step(model, [batch()])
    other = deepcopy(model)
    assert captured(other.base_model) is None
    with torch.no_grad():
        other.model.layers[0].mlp.up_proj.weight.mul_(2.0)
    assert not torch.equal(step(other, [batch()])[0][0], step(model, [batch()])[0][0])


def test_inner_states_come_from_the_model_itself():
    model = make("qwen2").double()
    expected = layer_rows(model, batch(), (1, 2))
    capture(model, pytest.fail)
    for _ in range(3):
        hidden, states = layer_rows(model, batch(), (1, 2))
        torch.testing.assert_close(hidden, expected[0])
        assert states.keys() == {1, 2}
    assert not captured(model.base_model)._passes
