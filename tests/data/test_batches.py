from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from dpkd.data.batches import Layout, TokenSequence, collate, micro_batches

EOS = 7
SEQUENCES = [TokenSequence((1, 2), (3, EOS)), TokenSequence((EOS,), (4, 5, 6, EOS)), TokenSequence((1,), ())]


@pytest.mark.parametrize("columns", [1, 8])
def test_the_rows_predict_the_response_however_long_the_padding_is(columns):
    batch = collate(SEQUENCES, pad_id=EOS, layout=Layout(columns=columns))
    flat = batch.input_ids.flatten()
    assert batch.targets.tolist() == [3, EOS, 4, 5, 6, EOS]
    # A row stands one place before its target, in the same sequence: the one shift.
    assert flat[batch.rows + 1].tolist() == batch.targets.tolist()
    assert (batch.rows // batch.input_ids.shape[1]).tolist() == batch.sequence.tolist() == [0, 0, 1, 1, 1, 1]
    assert batch.lengths.tolist() == [2, 4, 0]
    assert batch.attention_mask.sum(1).tolist() == [4, 5, 1]
    # EOS of the prompt is attended and not trained; padding is neither.
    assert batch.attention_mask.flatten()[batch.rows].all()


def test_a_response_without_a_prompt_has_no_row_for_its_first_token():
    batch = collate([TokenSequence((), (3, 4, 5))], pad_id=0)
    assert batch.targets.tolist() == [4, 5]
    assert batch.rows.tolist() == [0, 1]


@given(st.lists(st.integers(0, 30), max_size=20), st.integers(1, 6))
def test_micro_batches_take_each_once_longest_first(lengths, size):
    groups = micro_batches(lengths, size)
    flat = [i for g in groups for i in g]
    assert sorted(flat) == list(range(len(lengths)))
    assert [lengths[i] for i in flat] == sorted(lengths, reverse=True)


@pytest.mark.parametrize("layout", [Layout(), Layout(shared=True), Layout(packed=True)])
def test_the_host_does_as_much_for_many_sequences_as_for_few(layout):
    class Counting(TorchDispatchMode):
        operators = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            Counting.operators += 1
            return func(*args, **(kwargs or {}))

    counts = []
    for rows in (4, 64):
        Counting.operators = 0
        with Counting():
            collate([TokenSequence((5, i // 2), tuple(range(i % 7))) for i in range(rows)], pad_id=0, layout=layout)
        counts.append(Counting.operators)
    assert 10 < counts[0] == counts[1]
