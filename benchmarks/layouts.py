"""Layouts of a batch of pairs: how many tokens are processed for each real one, and what that costs.

32 pairs, prompts of 24 to 200 tokens, responses of 10 to 140; student 4 x 256 forward and backward, teacher 8 x 512
forward, both without the output head, which sees response positions only in all layouts. Real tokens are those of
prompt and response of each of the two rows.

    python benchmarks/layouts.py [--repeats 3] [--tiny]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import peers
import torch
from harness import markdown, seconds_of
from shapes import GPT2_PAIR, TINY_PAIR, new_model, sequences

from dpkd.data.batches import Batch, Layout, TokenSequence, collate, micro_batches
from dpkd.models.head import hidden_rows

__all__ = ["LAYOUTS", "table"]

Pair = tuple[TokenSequence, TokenSequence]
EOS, MICRO = 50256, 16  # rows of a forward pass


def pairs(count: int, prompt: tuple[int, int], response: tuple[int, int]) -> list[Pair]:
    """Two responses to each prompt."""
    rows = sequences(2 * count, prompt, response)
    return [(rows[i], TokenSequence(rows[i].prompt_ids, rows[i + 1].response_ids)) for i in range(0, 2 * count, 2)]


def _cut(given: list[Pair], layout: Layout) -> list[Batch]:
    rows = [row for pair in given for row in pair]
    return [collate(rows[i : i + MICRO], pad_id=EOS, layout=layout) for i in range(0, len(rows), MICRO)]


def _length(row: TokenSequence) -> int:
    return len(row.prompt_ids) + len(row.response_ids)


def to_512(given: list[Pair]) -> list[Batch]:
    """Every row padded to 512, as the published script does."""
    return _cut(given, Layout(columns=512))


def to_longest(given: list[Pair]) -> list[Batch]:
    """Rows in the order of the data, padded to the longest of a forward pass."""
    return _cut(given, Layout())


def sorted_pairs(given: list[Pair]) -> list[Batch]:
    """Pairs of like length together, as dpkd does."""
    lengths = [max(map(_length, pair)) for pair in given]
    groups = micro_batches(lengths, MICRO // 2)
    return [collate([row for i in group for row in given[i]], pad_id=EOS) for group in groups]


def _shared_length(pair: Pair) -> int:
    return _length(pair[0]) + len(pair[1].response_ids)


def shared(given: list[Pair], packed: bool = False) -> list[Batch]:
    """Both responses behind one copy of the prompt, in rows or in one row without padding."""
    parts = [given[i : i + MICRO // 2] for i in range(0, len(given), MICRO // 2)]
    layout = Layout(shared=True, packed=packed)
    return [collate([row for pair in part for row in pair], pad_id=EOS, layout=layout) for part in parts]


LAYOUTS: dict[str, Callable[[list[Pair]], list[Batch]]] = {
    "every row padded to 512": to_512,
    "padded to the longest": to_longest,
    "pairs sorted by length": sorted_pairs,
    "prompt shared, as they come": shared,
    "prompt shared, sorted (dpkd)": lambda given: shared(sorted(given, key=_shared_length, reverse=True)),
    "prompt shared, packed with a dense mask": lambda given: shared(given, packed=True),
}


def step(models: peers.Models, batches: list[Batch]) -> None:
    student, teacher = models
    student.zero_grad()
    for batch in batches:
        with torch.no_grad():
            hidden_rows(teacher, batch)
        hidden_rows(student, batch).sum().backward()


def table(repeats: int = 3, tiny: bool = False) -> str:
    shapes = TINY_PAIR if tiny else GPT2_PAIR
    models = new_model(shapes[0]).train(), new_model(shapes[1], 1).eval().requires_grad_(False)
    given = pairs(4, (4, 8), (4, 8)) if tiny else pairs(32, (24, 200), (10, 140))
    real = sum(_length(row) for pair in given for row in pair)
    cut = {name: layout(given) for name, layout in LAYOUTS.items()}
    taken = seconds_of({name: lambda batches=batches: step(models, batches) for name, batches in cut.items()}, repeats)
    base = taken["every row padded to 512"]
    rows = [
        [name, f"{sum(batch.input_ids.numel() for batch in batches) / real:.2f}", f"{taken[name] / base:.2f}"]
        for name, batches in cut.items()
    ]
    return markdown(["layout", "tokens processed / real", "time ratio"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--tiny", action="store_true", help="to see that it runs, not what it says")
    arguments = parser.parse_args()
    print(table(arguments.repeats, arguments.tiny))


if __name__ == "__main__":
    main()
