from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from dpkd.data.batch_sampler import BatchSampler, epoch_windows


@given(st.lists(st.integers(1, 50), min_size=1, max_size=60), st.integers(1, 9), st.integers(0, 3))
def test_every_example_once_an_epoch(lengths, size, epoch):
    windows = epoch_windows(lengths, size, seed=1, epoch=epoch)
    assert sorted(i for w in windows for i in w) == list(range(len(lengths)))
    assert all(1 <= len(w) <= size for w in windows)
    assert len(windows) == -(-len(lengths) // size)


def test_epochs_and_seeds_differ_and_repeat():
    lengths = list(range(40))
    first = epoch_windows(lengths, 4, seed=1, epoch=0)
    assert first == epoch_windows(lengths, 4, seed=1, epoch=0)
    assert first != epoch_windows(lengths, 4, seed=1, epoch=1)
    assert first != epoch_windows(lengths, 4, seed=2, epoch=0)


def test_neighbours_are_alike_in_length():
    lengths = [(37 * i) % 101 for i in range(128)]
    spread = [
        max(lengths[i] for i in w) - min(lengths[i] for i in w) for w in epoch_windows(lengths, 8, seed=0, epoch=0)
    ]
    assert sum(spread) / len(spread) < 20  # shuffled windows of 8 would spread about 80


def test_inner_epochs_go_over_the_same_windows_in_another_order():
    schedule = BatchSampler(
        [1] * 64, batch_size=4, steps=32, seed=3, refresh="every_n_steps", every=4, num_iterations=2
    )
    first = [schedule.window(s) for s in range(4)]
    second = [schedule.window(s) for s in range(4, 8)]
    assert sorted(map(tuple, first)) == sorted(map(tuple, second))
    assert {schedule.period(s) for s in range(8)} == {0}
    assert [s for s in range(32) if schedule.starts_period(s)] == [0, 8, 16, 24]
    assert not set(map(tuple, first)) & {tuple(schedule.window(s)) for s in range(8, 16)}


def test_periods_of_an_epoch_and_of_the_whole_run():
    common = {"batch_size": 4, "steps": 12, "seed": 0}
    per_epoch = BatchSampler([1] * 16, refresh="per_epoch", **common)
    assert [per_epoch.period(s) for s in range(12)] == [0] * 4 + [1] * 4 + [2] * 4
    once = BatchSampler([1] * 16, refresh="once", **common)
    assert {once.period(s) for s in range(12)} == {0}
    assert sorted({index for step in range(12) for index in once.window(step)}) == list(range(16))
