"""The caller's own use of accelerate, left as it was."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def own_accelerate_state() -> Iterator[None]:
    """A run inside the block has a precision and gradient accumulation of its own; the caller's are back after it.

    accelerate keeps both for the whole process, in dictionaries that all accelerators share. What the processes are
    (`PartialState`) is the same for the caller and the run, and stays.
    """
    from accelerate.state import AcceleratorState, GradientState

    shared = [AcceleratorState._shared_state, GradientState._shared_state]
    kept = [dict(state) for state in shared]
    for state in shared:
        state.clear()
    try:
        yield
    finally:
        for state, values in zip(shared, kept, strict=True):
            state.clear()
            state.update(values)
