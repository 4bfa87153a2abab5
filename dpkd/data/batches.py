"""Sequences to tensors: the one place where prompts and responses are joined, padded, shifted and masked.

Shapes: B sequences, R rows of tokens, T tokens of the longest row, N response tokens of the whole batch.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from itertools import accumulate, chain
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_Ints = NDArray[np.int64]


class TokenSequence(NamedTuple):
    """Ids of a prompt and of a response (its EOS included)."""

    prompt_ids: Sequence[int]
    response_ids: Sequence[int]

    @property
    def predicted(self) -> int:
        """Response tokens that have a row: a first token with nothing before it has none."""
        return max(0, len(self.response_ids) - (not self.prompt_ids))

    def __repr__(self) -> str:
        return f"TokenSequence({len(self.prompt_ids)} + {len(self.response_ids)} ids)"


# The label of a token that is not trained, as in torch and transformers.
IGNORED = -100


class LabeledRows(NamedTuple):
    """The trained tokens of a batch `[N]`, row by row: where they are predicted, what they are, where they are.

    rows     flat index (r · T + t) of the hidden state, or of the logits, that predict a token
    targets  the token
    places   flat index of the token itself
    """

    rows: Tensor
    targets: Tensor
    places: Tensor


def labeled_rows(labels_RT: Tensor, before_RT: Tensor | None = None) -> LabeledRows:
    """Find the tokens with a label: the only shift and the only mask in dpkd.

    `before_RT` is the column of the token before each, -1 where there is none; None: the column to the left. A token
    with nothing before it is not predicted, so it has no row.

    >>> labeled_rows(torch.tensor([[9, 7, 8], [-100, 5, -100]])).rows
    tensor([0, 1, 3])
    """
    longest = labels_RT.shape[1]
    if before_RT is None:
        before_RT = torch.arange(-1, longest - 1, device=labels_RT.device).expand_as(labels_RT)
    places = ((labels_RT != IGNORED) & (before_RT >= 0)).flatten().nonzero().squeeze(1)
    rows = places - places % longest + before_RT.flatten()[places]
    return LabeledRows(rows, labels_RT.flatten()[places], places)


def upload(tensor: Tensor, device: torch.device | str) -> Tensor:
    """The tensor on a device; to a GPU through pinned memory, so that the host does not wait for the copy."""
    if torch.device(device).type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


class Layout(NamedTuple):
    """How sequences become rows of tokens; it never changes a value.

    shared   the sequences that follow one prompt stand in one row, behind one copy of it
    packed   all sequences stand in one row, without padding
    columns  rows are padded to a multiple of so many tokens, wide ones further: lengths come again (`padded`)
    """

    shared: bool = False
    packed: bool = False
    columns: int = 1


PLAIN = Layout()


def padded(width: int, columns: int) -> int:
    """The width of rows that are padded to a multiple of `columns`; with more than 1 there are eight widths an octave.

    >>> [padded(width, 8) for width in (3, 100, 257, 600)], padded(257, 1)
    ([8, 104, 288, 640], 257)
    """
    step = columns if columns == 1 else max(columns, 1 << max(0, (width - 1).bit_length() - 4))
    return -(-width // step) * step


@dataclass(frozen=True)
class Batch:
    """Rows of tokens, and the packed rows of their response tokens.

    input_ids, attention_mask, position_ids  [R, T]
    spans      [2, R, T] which prompt a token belongs to, and which of its responses (0: the prompt itself);
               None where each row is one sequence
    ends       where the sequences of a packed row begin and end: 0, ascending, T as often as places are left; padding
               makes sequences of its own. None where rows are not packed, or sequences share a prompt
    rows       [N] flat index (r · T + t) of the hidden state that predicts each response token
    targets    [N] that token
    sequence   [N] the sequence that it belongs to, ascending
    lengths    [B] response tokens of each sequence
    sequences  the B sequences themselves
    """

    input_ids: Tensor
    attention_mask: Tensor
    position_ids: Tensor
    spans: Tensor | None
    ends: Tensor | None
    rows: Tensor
    targets: Tensor
    sequence: Tensor
    lengths: Tensor
    sequences: tuple[TokenSequence, ...]

    @property
    def longest_response(self) -> int:
        """The largest of `lengths`, known without asking the device."""
        return max((sequence.predicted for sequence in self.sequences), default=0)

    @property
    def longest_sequence(self) -> int:
        """At least the tokens of the longest sequence: the next power of two, which hardly ever changes."""
        return _longest(self.sequences)

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on another device."""
        values = {one.name: getattr(self, one.name) for one in fields(self)}
        moved = {k: upload(v, device) for k, v in values.items() if isinstance(v, Tensor)}
        return Batch(**{**values, **moved})


class _Place(NamedTuple):
    """Where a sequence stands: its row, the columns where its prompt and its response begin, and its marks."""

    row: int
    prompt_at: int
    response_at: int
    tree: int
    branch: int


def collate(sequences: Sequence[TokenSequence], *, pad_id: int, layout: Layout = PLAIN) -> Batch:
    """One batch, padded on the right to its longest row; the layout never changes a value.

    A token is trained because of its place, never because of its id: a pad that equals EOS hides no EOS. The hidden
    state that predicts a token is the one before it, for the first token of a response the last one of its prompt
    (`labeled_rows`). A response token with nothing before it (an empty prompt) has no row.
    """
    places, widths = _places(sequences, layout)
    longest = padded(max(widths, default=0), layout.columns)
    shape = (len(widths), longest)
    # In NumPy: PyTorch would wake its threads for each of these small arrays.
    # Prompts, then responses: where each begins, and of each token where it stands.
    prompts, responses = ([s[i] for s in sequences] for i in (0, 1))
    sizes = np.fromiter((len(ids) for ids in (*prompts, *responses)), dtype=np.int64)

    def of_tokens(of_prompts: Iterable[int], of_responses: Iterable[int]) -> _Ints:
        return np.fromiter((*of_prompts, *of_responses), dtype=np.int64).repeat(sizes)

    row = of_tokens(*([place.row for place in places],) * 2)
    first = of_tokens((place.prompt_at for place in places), (place.response_at for place in places))
    offset = np.arange(len(row)) - (sizes.cumsum() - sizes).repeat(sizes)
    column = first + offset
    here = row * longest + column
    ids = np.fromiter(chain.from_iterable((*prompts, *responses)), dtype=np.int64)

    def table(fill: int, values: _Ints | int, where: _Ints = here) -> Tensor:
        made = np.full(shape, fill, dtype=np.int64)
        made.reshape(-1)[where] = values
        return torch.from_numpy(made)

    nothing = [0] * len(sequences)
    input_ids, attention_mask = table(pad_id, ids), table(0, 1)
    position_ids = table(0, of_tokens(nothing, map(len, prompts)) + offset)
    trees, branches = ([place.tree for place in places], [place.branch for place in places])
    spans = torch.stack([table(-1, of_tokens(trees, trees)), table(-1, of_tokens(nothing, branches))])
    # Of the responses alone: what is predicted, from which column, and whose it is.
    is_response = slice(sum(map(len, prompts)), None)
    ends = [place.prompt_at + len(prompt) for place, prompt in zip(places, prompts, strict=True)]
    before_first = of_tokens(nothing, (end - 1 if prompt else -1 for end, prompt in zip(ends, prompts, strict=True)))
    own = here[is_response]
    labels = table(IGNORED, ids[is_response], own)
    before = table(-1, np.where(offset == 0, before_first, column - 1)[is_response], own)
    owner = table(0, of_tokens(nothing, range(len(sequences)))[is_response], own)
    found = labeled_rows(labels, before)
    sequence, order = owner.flatten()[found.places].sort(stable=True)
    return Batch(
        input_ids,
        attention_mask,
        position_ids,
        spans if len(widths) < len(sequences) else None,
        ends=_ends(sequences, longest) if layout.packed and all(place.branch == 1 for place in places) else None,
        rows=found.rows[order],
        targets=found.targets[order],
        sequence=sequence,
        lengths=torch.bincount(sequence, minlength=len(sequences)),
        sequences=tuple(sequences),
    )


def _places(sequences: Sequence[TokenSequence], layout: Layout) -> tuple[list[_Place], list[int]]:
    """The place of each sequence, and the width of each row."""
    trees = _trees(sequences) if layout.shared else [[b] for b in range(len(sequences))]
    places: dict[int, _Place] = {}
    widths: list[int] = []
    for tree, members in enumerate(trees):
        if not widths or not layout.packed:
            widths.append(0)
        prompt_at, prompt = widths[-1], sequences[members[0]].prompt_ids
        at = prompt_at + len(prompt)
        for branch, b in enumerate(members, start=1):
            places[b] = _Place(len(widths) - 1, prompt_at, at, tree, branch)
            at += len(sequences[b].response_ids)
        widths[-1] = at
    return [places[b] for b in range(len(sequences))], widths


def _longest(sequences: Sequence[TokenSequence]) -> int:
    most = max((len(prompt) + len(response) for prompt, response in sequences), default=0)
    return max(16, 1 << (most - 1).bit_length())


def _ends(sequences: Sequence[TokenSequence], width: int) -> Tensor:
    """`Batch.ends` of a row of `width` tokens; as many for every batch of so many sequences."""
    longest = _longest(sequences)
    ends = [0, *accumulate(len(prompt) + len(response) for prompt, response in sequences)]
    ends += range(ends[-1] + longest, width, longest)  # padding is at most an eighth of the row (`padded`)
    spare = padded(len(sequences) + len(sequences) // 8 + 3, 8) - len(ends)
    return torch.tensor(ends + [width] * max(1, spare), dtype=torch.int32)


def _trees(sequences: Sequence[TokenSequence]) -> list[list[int]]:
    """The sequences behind each prompt, in the order in which the prompts first appear; an empty one is not shared."""
    behind: dict[tuple[int, ...] | int, list[int]] = {}
    for b, one in enumerate(sequences):
        behind.setdefault(tuple(one.prompt_ids) or b, []).append(b)
    return list(behind.values())


def micro_batches(
    lengths: Sequence[int], size: int, tokens: int | None = None, *, packed: bool = False
) -> list[list[int]]:
    """Indices of a window, longest first, cut into micro-batches of at most `size`: little padding.

    With `tokens`, a micro-batch has at most so many, padded to its longest where it is not `packed`; what is longer
    by itself stands alone.

    >>> micro_batches([3, 9, 4, 8], 2)
    [[1, 3], [2, 0]]
    >>> micro_batches([3, 9, 4, 8], 3, tokens=16)
    [[1], [3, 2], [0]]
    """
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    groups: list[list[int]] = []
    used = 0
    for i in order:
        more = lengths[i] if packed or not groups else lengths[groups[-1][0]]
        full = groups and (len(groups[-1]) >= size or (tokens is not None and used + more > tokens))
        if full or not groups:
            groups.append([])
            used, more = 0, lengths[i]
        groups[-1].append(i)
        used += more
    return groups
