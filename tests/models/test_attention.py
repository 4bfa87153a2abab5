"""Several sequences in one row give what each gives in a row of its own."""

from __future__ import annotations

import shutil
from dataclasses import fields

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, OPTConfig, Qwen2Config

from dpkd.data.batches import Batch, Layout, TokenSequence, collate
from dpkd.models import attention
from dpkd.models.attention import visible
from dpkd.models.head import hidden_rows
from dpkd.models.student_init import recompute_activations

SIZES = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
CONFIGS = {
    "gpt2": GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=64),
    "opt": OPTConfig(**SIZES, ffn_dim=64, word_embed_proj_dim=32, max_position_embeddings=64),
    "llama": LlamaConfig(**SIZES, intermediate_size=64),
    "qwen2": Qwen2Config(**SIZES, intermediate_size=64, num_key_value_heads=2),
}
LAYOUTS = [
    Layout(shared=True),
    Layout(packed=True),
    Layout(shared=True, packed=True),
    Layout(packed=True, columns=8),
    Layout(columns=8),
    Layout(shared=True, columns=8),
]
PAIRS = [
    TokenSequence((5, 6, 7), (8, 9, 3)),
    TokenSequence((10, 4, 11, 12), (13,)),
    TokenSequence((2,), (14, 15)),
    TokenSequence((5, 6, 7), (20, 21, 22, 23, 3)),
    TokenSequence((10, 4, 11, 12), (24, 25, 3)),
    TokenSequence((2,), ()),
]


def gradients(model, batch):
    """Hidden rows, and the gradients of a weighted sum of them: weights differ by row and by place."""
    model.zero_grad()
    hidden_NH = hidden_rows(model, batch)
    weights = torch.linspace(-1, 1, hidden_NH.numel(), dtype=hidden_NH.dtype).view_as(hidden_NH)
    (hidden_NH * weights).sum().backward()
    return hidden_NH.detach(), [p.grad.clone() for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("kind", ["sdpa", "eager"])
@pytest.mark.parametrize("family", CONFIGS)
def test_hidden_states_and_gradients_equal_those_of_separate_rows(family, kind):
    torch.manual_seed(0)
    # In float64: nothing hangs on one processor's rounding. Norms and angles of Llama and Qwen, and the softmax of
    # eager attention, are in float32 all the same: steps of 2^-24 of the largest value, some hundred of them in a sum.
    model = AutoModelForCausalLM.from_config(CONFIGS[family], attn_implementation=kind).double().eval()
    exact = kind == "sdpa" and family in ("gpt2", "opt")
    expected, expected_gradients = gradients(model, collate(PAIRS, pad_id=3))
    assert len(expected) == 14
    assert len(expected_gradients) > 10
    largest = max(values.abs().max().item() for values in (expected, *expected_gradients))
    for layout in LAYOUTS:
        batch = collate(PAIRS, pad_id=3, layout=layout)
        assert batch.input_ids.shape[0] == (1 if layout.packed else 3 if layout.shared else 6)
        assert batch.input_ids.shape[1] % layout.columns == 0
        ours, our_gradients = gradients(model, batch)
        for own, want in zip([ours, *our_gradients], [expected, *expected_gradients], strict=True):
            torch.testing.assert_close(own, want, rtol=0.0, atol=1e-10 if exact else 512 * 2.0**-24 * largest)


@pytest.mark.parametrize("family", CONFIGS)
def test_on_a_gpu_packed_rows_go_through_the_kernel_of_pytorch_in_half_precision(family, monkeypatch):
    """On fake tensors, which need no GPU: whether operators, shapes and types fit together, both ways."""
    monkeypatch.setattr(attention, "KERNEL_ON", ("cpu",))
    seen = []

    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append((func.overloadpacket.__name__, args))
            return func(*args, **(kwargs or {}))

    batch = collate(PAIRS, pad_id=3, layout=Layout(packed=True, columns=8))
    with FakeTensorMode() as fake:
        model = AutoModelForCausalLM.from_config(CONFIGS[family], attn_implementation="sdpa").train()
        given = {one.name: getattr(batch, one.name) for one in fields(batch)}
        made = Batch(**{k: fake.from_tensor(v) if isinstance(v, torch.Tensor) else v for k, v in given.items()})
        assert not attention.reads_packed_rows(model)
        with torch.autocast("cpu", torch.bfloat16), Seen():
            assert attention.reads_packed_rows(model)
            hidden_rows(model, made).float().sum().backward()
    forward = [args for name, args in seen if name == "_flash_attention_forward"]
    assert len(forward) == sum(name == "_flash_attention_backward" for name, _ in seen) == 2
    for query, _, _, begin, end, *longest in (args[:7] for args in forward):
        assert (query.dtype, tuple(query.shape)) == (torch.bfloat16, (batch.input_ids.shape[1], 4, 8))
        assert begin is end
        assert longest == [16, 16]
    assert model.config._attn_implementation == "sdpa"


def test_what_computes_activations_again_keeps_its_masks():
    """Backward runs the layers with the model's own attention, which knows nothing of ours."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS["llama"], attn_implementation="sdpa").double().train()
    assert attention.reads_packed_rows(model)
    expected, expected_gradients = gradients(model, collate(PAIRS, pad_id=3))
    recompute_activations(model, selective=False)
    assert not attention.reads_packed_rows(model)
    ours, our_gradients = gradients(model, collate(PAIRS, pad_id=3, layout=Layout(packed=True)))
    for own, want in zip([ours, *our_gradients], [expected, *expected_gradients], strict=True):
        torch.testing.assert_close(own, want, rtol=0.0, atol=1e-5)


@pytest.mark.skipif(shutil.which("g++") is None, reason="FlexAttention on a CPU needs a C++ compiler")
@pytest.mark.filterwarnings("ignore")  # torch's compiler warns about itself
def test_flex_attention_gives_the_same_hidden_states():
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS["llama"], attn_implementation="sdpa").eval()
    with torch.no_grad():
        expected = hidden_rows(model, collate(PAIRS, pad_id=3))
        model.config._attn_implementation = "flex_attention"
        ours = hidden_rows(model, collate(PAIRS, pad_id=3, layout=Layout(shared=True)))
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)


@given(st.data())
@settings(max_examples=30, deadline=None)
def test_a_token_sees_its_prompt_and_its_own_response_up_to_itself(data):
    """Against the definition, token by token."""
    ids = st.lists(st.integers(1, 5), max_size=3)
    count = data.draw(st.integers(2, 5))
    sequences = [TokenSequence(tuple(data.draw(ids)), tuple(data.draw(ids))) for _ in range(count)]
    layout = data.draw(st.sampled_from(LAYOUTS))
    batch = collate(sequences, pad_id=0, layout=layout)
    if batch.spans is None:  # nothing to share
        return
    seen = visible(batch.spans).numpy()
    tree, branch = batch.spans.numpy()
    for r in range(tree.shape[0]):
        for i in range(tree.shape[1]):
            for j in range(tree.shape[1]):
                related = tree[r, i] == tree[r, j] and branch[r, j] in (0, branch[r, i])
                assert seen[r, i, j] == (related and j <= i)
    # No row of the mask is empty: a softmax over nothing is not a number.
    assert seen.any(-1).all()


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_a_layout_changes_neither_targets_nor_positions_nor_what_stands_before_a_target(data):
    ids = st.lists(st.integers(1, 9), max_size=4)
    prompts = data.draw(st.lists(ids, min_size=1, max_size=4))
    sequences = [TokenSequence(tuple(p), tuple(data.draw(ids))) for _ in range(2) for p in prompts]
    plain = collate(sequences, pad_id=0)
    for layout in LAYOUTS:
        batch = collate(sequences, pad_id=0, layout=layout)
        assert batch.targets.tolist() == plain.targets.tolist()
        assert batch.sequence.tolist() == plain.sequence.tolist()
        assert batch.lengths.tolist() == plain.lengths.tolist()
        for name in ("input_ids", "position_ids"):
            ours, theirs = getattr(batch, name).flatten(), getattr(plain, name).flatten()
            assert ours[batch.rows].tolist() == theirs[plain.rows].tolist()
        assert batch.attention_mask.flatten()[batch.rows].all()
        assert batch.attention_mask.sum() <= plain.attention_mask.sum()
        if layout.packed and layout.columns == 1:
            assert batch.attention_mask.all()
    assert np.all(np.diff(plain.sequence.numpy()) >= 0)
