"""Decoding with static shapes: the same operators at every token, no wait for the host, and a way back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from test_golden_responses import assert_golden, model_of, responses
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, GPTNeoConfig, LlamaConfig

from dpkd.api import Sampled, SamplingSettings
from dpkd.models import head
from dpkd.models.cuda_graphs import Replay
from dpkd.rollout import static_decoding
from dpkd.rollout.sampling import Decoder
from dpkd.rollout.static_decoding import CHECK_EVERY, DecodingState, column_bucket, decode_step, row_bucket

PROMPTS = [[5, 6, 7, 8], [9, 10, 11, 12], [13, 14, 15, 16], [17, 18, 19, 20]]
POLICIES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({}, {}),
    "greedy": ({"temperature": 0.0}, {}),
    "filters": ({"top_p": 0.8, "top_k": 9, "temperature": 0.8}, {}),
    "nucleus": ({"top_p": 0.8}, {}),
    "mix": ({}, {"mix": 0.3}),
    "veto": ({"top_p": 0.9}, {"veto": 6}),
}


def decoder_of(model: Any, decoding: Any = "graph", eos_ids: tuple[int, ...] = ()) -> Decoder:
    return Decoder(model, eos_ids=eos_ids, pad_id=0, decoding=decoding)


def draw(decoder: Decoder, tokens: int = 40, seed: int = 0, **more: Any) -> list[Sampled]:
    settings = SamplingSettings(max_new_tokens=tokens, batch_size=4, **more.pop("settings", {}))
    return decoder.draw(PROMPTS, settings, seeds=range(seed, seed + 4), **more)


def state_of(decoder: Decoder) -> DecodingState:
    assert decoder._batcher is not None
    state = decoder._batcher[1].state
    assert state is not None
    return state


def assert_same(got: list[Sampled], want: list[Sampled]) -> None:
    assert got == want
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one.logps, other.logps, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(one.behaviour_logps, other.behaviour_logps, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "case", ["plain-llama", "plain-opt", "filters", "teacher-mix", "teacher-veto", "several", "long"]
)
def test_the_responses_are_those_of_the_first_version(
    case: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(static_decoding, "SHRINK", 0.5)
    monkeypatch.setattr(static_decoding, "SMALLEST_WINDOW", 1)  # rows move as soon as half of them have ended
    assert_golden(case, responses(case, decoding="graph"))
    assert not caplog.text


@pytest.mark.parametrize("case", ["plain-gpt2", "teacher-mix", "vocabulary"])
def test_a_head_with_further_rows_draws_the_same(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head, "ALIGNED_ON", ("cpu",))
    assert_golden(case, responses(case, decoding="graph"))


@pytest.mark.parametrize("every", [1, 3, 20])
def test_when_the_host_looks_does_not_matter(every: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(static_decoding, "CHECK_EVERY", every)
    assert_golden("long", responses("long", decoding="graph"))


CONVERSIONS = ("__bool__", "__int__", "__float__", "__index__")


class HostWaits(TorchFunctionMode):
    """Counts what makes the host read a tensor's value."""

    READS = (
        "tolist",
        "item",
        "cpu",
        "numpy",
        "__bool__",
        "__int__",
        "__float__",
        "__index__",
        "nonzero",
        "masked_select",
    )

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.counts = True

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.counts and getattr(func, "__name__", "") in self.READS:
            self.found.append(func.__name__)
        return func(*args, **(kwargs or {}))


class Operators(TorchDispatchMode):
    """Every operator with the shapes that it sees."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[Any, ...]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        tensors = torch.utils._pytree.tree_leaves((args, kwargs))
        self.seen.append((str(func), *(tuple(t.shape) for t in tensors if isinstance(t, torch.Tensor))))
        return func(*args, **(kwargs or {}))


SYNCHRONIZING = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "equal.default", "is_nonzero")


@pytest.mark.parametrize("name", POLICIES)
def test_the_host_waits_once_for_several_tokens(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    settings, more = POLICIES[name]
    model, teacher = model_of("gpt2"), model_of("llama", seed=1)
    waits, read = HostWaits(), static_decoding.responses

    @contextmanager
    def uncounted() -> Iterator[None]:
        waits.counts = False
        yield
        waits.counts = True

    def arrived(*arguments: Any) -> Any:
        with uncounted():  # these tensors are on the host already
            return read(*arguments)

    monkeypatch.setattr(static_decoding, "responses", arrived)
    with waits:
        drawn = draw(decoder_of(model), 41, settings=settings, mix_with=teacher if more else None, **more)
    assert [len(one.response_ids) for one in drawn] == [41] * 4
    assert waits.found == ["tolist"] * (40 // CHECK_EVERY)


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_every_step_runs_the_same_operators_over_the_same_shapes(name: str, family: str) -> None:
    settings, more = POLICIES[name]
    decoder = decoder_of(model_of(family))
    draw(decoder, settings=settings, mix_with=model_of("llama", seed=1) if more else None, **more)
    step, seen = state_of(decoder).step(4, 64), []
    state_of(decoder).column.fill_(10)
    for _ in range(3):
        with torch.no_grad(), Operators() as operators:
            step()
        seen.append(operators.seen)
    assert seen[0] == seen[1] == seen[2]
    assert len(seen[0]) > 50
    assert not [name for name, *_ in seen[0] if any(part in name for part in SYNCHRONIZING)]


@pytest.mark.parametrize("name", POLICIES)
def test_a_step_has_no_graph_break(name: str) -> None:
    settings, more = POLICIES[name]
    decoder = decoder_of(model_of("llama"))
    draw(decoder, settings=settings, mix_with=model_of("gpt2", seed=1) if more else None, **more)
    state, found = state_of(decoder), []
    torch._dynamo.reset()
    compiled = torch.compile(decode_step, fullgraph=True, backend="eager", dynamic=False)
    for step in (decode_step, compiled):
        draw(decoder, settings=settings, mix_with=decoder._batcher[0], **more)  # the state as it was
        state.column.fill_(20)
        state.rows.done_B.fill_(False)
        state.rows.count_B.fill_(3)
        caches = [arena.window(4, 64, state.column) for arena in state.arenas]
        rows, seen_B11C = state.rows.map(lambda part: part[:4]), state.seen_R11C[:4, :, :, :64]
        with torch.no_grad():
            for _ in range(3):
                step(state.models, caches, rows, seen_B11C, state.column, state.policy)
        found.append(rows.packed().clone())
    torch.testing.assert_close(found[0], found[1], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("aligned", [False, True])
def test_the_state_is_kept_and_sees_new_weights(aligned: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a head of the model's own number of tokens, and with a copy of more rows, as on a GPU."""
    model = model_of("gpt2")
    if aligned:
        monkeypatch.setattr(head, "ALIGNED_ON", ("cpu",))
    decoder, eager = decoder_of(model, eos_ids=(3, 17)), decoder_of(model, "eager", eos_ids=(3, 17))
    first = draw(decoder)
    state = state_of(decoder)
    assert (state.models[0]._aligned is not None) is aligned
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    second = draw(decoder, seed=9)
    assert state_of(decoder) is state
    assert_same(second, draw(eager, seed=9))
    assert first != second
    model.double()  # the weights are elsewhere now
    assert_same(draw(decoder, seed=9), draw(eager, seed=9))
    assert state_of(decoder) is not state


def test_a_smaller_call_fits_and_a_larger_one_gets_more_memory() -> None:
    model = model_of("llama")
    decoder, eager = decoder_of(model), decoder_of(model, "eager")
    settings = SamplingSettings(max_new_tokens=12, batch_size=8)
    draw_all = [PROMPTS[:2], PROMPTS, [prompt * 20 for prompt in PROMPTS], PROMPTS[:1]]
    for prompts in draw_all:
        seeds = range(len(prompts))
        assert_same(decoder.draw(prompts, settings, seeds=seeds), eager.draw(prompts, settings, seeds=seeds))


def checked(model: Any) -> Decoder:
    """As `auto` on a GPU."""
    decoder = decoder_of(model, "auto")
    decoder._static = True
    return decoder


def test_the_first_responses_are_compared_with_a_plain_forward(caplog: pytest.LogCaptureFixture) -> None:
    model = model_of("llama")
    decoder = checked(model)
    assert_same(draw(decoder), draw(decoder_of(model, "eager")))
    assert decoder._static
    assert not decoder._unchecked
    assert not caplog.text


def test_a_model_that_decodes_otherwise_with_static_shapes_goes_on_eagerly(caplog: pytest.LogCaptureFixture) -> None:
    """Its local attention counts columns, not positions: no error, but other log-probs."""
    torch.manual_seed(0)
    config = GPTNeoConfig(
        vocab_size=61,
        hidden_size=32,
        num_layers=2,
        num_heads=2,
        attention_types=[[["local"], 2]],
        window_size=4,
        max_position_embeddings=96,
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(5.0)
    decoder = checked(model)
    got = draw(decoder)
    assert not decoder._static
    assert "text.decoding: eager, because static shapes do not work here: its log-probs differ" in caplog.text
    assert len(caplog.records) == 1
    assert_same(got, draw(decoder_of(model, "eager")))


def test_a_failure_in_the_middle_does_not_end_a_run(caplog: pytest.LogCaptureFixture) -> None:
    model, steps = model_of("gpt2"), []

    def failing(module: Any, arguments: Any, keywords: dict[str, Any]) -> None:
        mask = keywords["attention_mask"]
        if mask is not None and mask.ndim == 4:
            steps.append(mask.shape)
            if len(steps) > 25:
                raise RuntimeError("operation not permitted when stream is capturing\nand more")

    finished: list[int] = []
    settings, seeds = SamplingSettings(max_new_tokens=40, batch_size=4), range(12)
    prompts = PROMPTS * 3
    want = decoder_of(model, "eager", eos_ids=(3, 17)).draw(prompts, settings, seeds=seeds)
    model.register_forward_pre_hook(failing, with_kwargs=True)
    decoder = decoder_of(model, eos_ids=(3, 17))
    got = decoder.draw(prompts, settings, seeds=seeds, on_finished=lambda place, _: finished.append(place))
    assert_same(got, want)
    assert sorted(finished) == list(range(12))
    assert caplog.text.count("not permitted when stream is capturing") == 1
    assert len(steps) == 26  # static shapes are not tried again
    decoder.draw(prompts, settings, seeds=seeds)
    assert len(steps) == 26


def test_a_model_that_reads_values_is_refused_before_a_capture(caplog: pytest.LogCaptureFixture) -> None:
    """A mixture of experts that looks up which tokens go to which expert, say."""
    model, read = model_of("gpt2"), []
    model.transformer.h[1].register_forward_hook(lambda *parts: read.append(parts[-1].sum().item()))
    decoder = decoder_of(model)
    got = draw(decoder)
    assert "the model reads values on the host (aten._local_scalar_dense" in caplog.text
    assert_same(got, draw(decoder_of(model, "eager")))
    assert read


def test_few_windows_are_captured(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """1,277 responses of some 70 tokens, at most 128, to prompts of 20 to 192 tokens, 256 at a time."""
    made: list[Replay] = []

    class Counted(Replay):
        def __init__(self, *parts: Any) -> None:
            super().__init__(*parts)
            made.append(self)

    monkeypatch.setattr(static_decoding, "Replay", Counted)
    shape = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(LlamaConfig(vocab_size=96, max_position_embeddings=512, **shape)).eval()
    count = 1_277
    prompts = [[5] * (20 + 172 * (i % 100) ** 3 // 99**3) for i in range(count)]  # most are short, as Dolly's are
    decoder = decoder_of(model, eos_ids=(2,))
    settings = SamplingSettings(max_new_tokens=128, batch_size=256)
    drawn = decoder.draw(prompts, settings, seeds=range(count))
    assert 60 < sum(len(one.response_ids) for one in drawn) / count < 80
    assert len(made) <= 4
    decoder.draw(prompts[:256], settings, seeds=range(256))
    assert not caplog.text
    assert len(made) <= 4  # the windows are kept from one call to the next


def test_buckets() -> None:
    assert [row_bucket(n) for n in (1, 2, 3, 8, 9, 48, 64, 65, 200)] == [1, 2, 4, 8, 16, 64, 64, 128, 256]
    assert [column_bucket(n) for n in (1, 64, 65, 200, 300, 513, 1000, 1100)] == [
        64,
        64,
        128,
        256,
        320,
        640,
        1024,
        1280,
    ]
    for n in range(1, 3000):
        assert n <= column_bucket(n) < n + max(64, n / 4)
        assert column_bucket(n) % 64 == 0
