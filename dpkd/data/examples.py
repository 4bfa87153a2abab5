"""Instruction data: rows of a file or of the hub as examples; bad rows reported at once, by file and line."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

from dpkd.data.formats import Example, RowFormat, check_text, find_shape, not_understood, to_examples
from dpkd.data.rows import BadRow, RawRow
from dpkd.data.settings import DataSettings, MixPart
from dpkd.data.sources import Place, memory_source, open_source
from dpkd.data.wording import TRAINING, Wording
from dpkd.errors import DpkdError

MOST_BAD_ROWS_SHOWN = 20


@dataclass(frozen=True)
class ExampleSet:
    """Examples in the order of their file, the rows left out, a hash of the examples, and their origin.

    `rows` is the number of rows that the examples are from, for a mixture that of the examples.
    """

    examples: tuple[Example, ...]
    skipped: tuple[BadRow, ...]
    fingerprint: str
    source: str
    rows: int

    def skipped_by_reason(self) -> dict[str, int]:
        """How many rows were left out, for each kind of mistake."""
        return dict(Counter(bad.reason for bad in self.skipped))

    def lines(self) -> list[str]:
        """For printing: what was read, and every kind of bad row with the first place where it stands."""
        first = {bad.reason: bad.where for bad in reversed(self.skipped)}
        counts = self.skipped_by_reason().items()
        turns = f"{self.rows:,} rows are {len(self.examples):,} examples: every assistant turn of a conversation is "
        return [
            f"{self.source}: {len(self.examples):,} examples",
            *([f"{turns}trained on (data.train_on: all)"] if len(self.examples) > self.rows else []),
            *(f"skipped {count:,}: {reason} (first: {first[reason]})" for reason, count in counts),
        ]


def read_examples(
    settings: DataSettings,
    *,
    require_response: bool = True,
    pairs: bool | None = None,
    rows: Iterable[Any] | None = None,
    seed: int = 0,
    teacher_column: str | None = None,
    wording: Wording = TRAINING,
) -> ExampleSet:
    """All examples of a data set or a mixture, at most `limit` rows of each.

    Without `require_response`, rows that hold a prompt alone are good too. `pairs`: whether the rejected responses of
    pairs are used; where they are not, rows that have them are refused (None: they do not matter). `rows` are those of
    the data set, if in memory; `seed` decides the order of a mixture; `teacher_column` has the name of each row's
    teacher; `wording` is what messages call settings. Raises DpkdError for data that cannot be found, columns that are
    not understood, bad rows (unless skipped), and when nothing is left.
    """
    if settings.mix:
        parts = [
            read_examples(
                _part(settings, part),
                require_response=require_response,
                pairs=pairs,
                teacher_column=teacher_column,
                wording=wording,
            )
            for part in settings.mix
        ]
        return _mixed(settings, parts, seed)
    place = Place(settings.path, settings.split, wording, settings.subset, settings.streaming)
    source = open_source(place) if rows is None else memory_source(rows)
    reader = _Reader(settings, require_response, teacher_column)
    reader.read(islice(source.rows, settings.limit))
    examples, bad = tuple(reader.examples), tuple(reader.bad)
    if bad and settings.on_bad_row == "error":
        raise _bad_rows(source.description, bad, wording)
    found = ExampleSet(examples, bad, fingerprint(examples), source.description, reader.rows)
    if not examples and not bad:
        where = f" in {source.description}" if rows is None else ""
        raise DpkdError(f"{wording.path}: there are no rows{where}. Name a set that has some: {wording.own_file}")
    if not examples:
        raise DpkdError("\n".join([f"{wording.path}: no row of {settings.path} can be used.", *found.lines()[1:]]))
    _check_pairs(examples, settings, pairs)
    return found


def _part(settings: DataSettings, part: MixPart) -> DataSettings:
    own = {name: getattr(part, name) for name in type(part).model_fields if name != "weight"}
    return settings.model_copy(update={"mix": (), **{name: value for name, value in own.items() if value is not None}})


def _mixed(settings: DataSettings, parts: Sequence[ExampleSet], seed: int) -> ExampleSet:
    """The parts as one set, in the order in which `datasets` interleaves them."""
    import datasets

    total = sum(part.weight for part in settings.mix)
    order = datasets.interleave_datasets(
        [
            datasets.Dataset.from_dict({"part": [number] * len(part.examples), "row": list(range(len(part.examples)))})
            for number, part in enumerate(parts)
        ],
        probabilities=[part.weight / total for part in settings.mix],
        seed=seed,
        stopping_strategy=settings.mix_until,
    )
    times: Counter[tuple[int, int]] = Counter()
    examples = []
    for one in order:
        place = (one["part"], one["row"])
        example = parts[place[0]].examples[place[1]]
        # Ids tell examples apart: of the data set, and of a row that comes again.
        again = f"+{times[place]}" if times[place] else ""
        template = settings.mix[place[0]].template or example.template
        examples.append(replace(example, id=f"{place[0] + 1}/{example.id}{again}", template=template))
        times[place] += 1
    shares = Counter(one["part"] for one in order)
    source = " + ".join(f"{part.source} ({shares[number]:,})" for number, part in enumerate(parts))
    skipped = tuple(bad for part in parts for bad in part.skipped)
    found = tuple(examples)
    return ExampleSet(found, skipped, fingerprint(found), source, len(found))


def _check_pairs(examples: Sequence[Example], settings: DataSettings, pairs: bool | None) -> None:
    """Raises DpkdError where rejected responses would lie unread, or are needed and not there."""
    has = next((example for example in examples if example.rejected is not None), None)
    if pairs is False and has is not None and not settings.drop_rejected:
        raise DpkdError(
            f"{has.id}: the rows are pairs of a chosen and a rejected response, but this loss ignores the rejected "
            "one. For a loss on pairs: --set text.source=preference. To train on the chosen responses alone: --set "
            "data.drop_rejected=true"
        )
    lacks = next((example for example in examples if example.rejected is None), None)
    if pairs and lacks is not None:
        raise DpkdError(
            f"{lacks.id}: has no rejected response, and text.source=preference needs one in every row (columns chosen "
            "and rejected, or data.columns.output and data.columns.rejected)"
        )


_LATER_FIELDS = (
    "rejected",
    "more",
    "template",
    "teacher",
)  # left out where they are None: the hashes of older data stay


def fingerprint(examples: Iterable[Example]) -> str:
    """A hash of ids and content in order: the same on every machine, and for no other data."""
    digest = hashlib.sha256()
    for example in examples:
        values = {k: v for k, v in vars(example).items() if v is not None or k not in _LATER_FIELDS}
        digest.update(json.dumps(values, sort_keys=True).encode())
        digest.update(b"\n")
    return digest.hexdigest()


class _Reader:
    """Collects examples and bad rows; the shape is the one of the first row that has one."""

    def __init__(self, settings: DataSettings, require_response: bool, teacher_column: str | None = None) -> None:
        self._settings, self._require_response, self._teacher_column = settings, require_response, teacher_column
        self._shape: RowFormat | None = None
        self._input_seen = settings.columns.input is None or settings.limit is not None
        self.examples: list[Example] = []
        self.bad: list[BadRow] = []
        self.rows = 0

    def read(self, rows: Iterable[RawRow | BadRow]) -> None:
        stops = self._settings.on_bad_row == "error"
        unshaped: RawRow | None = None
        for row in rows:
            result = self._examples(row)
            if isinstance(result, list):
                self.examples += result
                self.rows += 1
            else:
                self.bad.append(result)
                if self._shape is None and isinstance(row, RawRow):
                    unshaped = unshaped or row
                if stops and len(self.bad) == MOST_BAD_ROWS_SHOWN:
                    break
        if self._shape is None and unshaped:
            raise not_understood(unshaped, self._settings.columns, require_response=self._require_response)
        if self.examples and not self._input_seen:
            name = self._settings.columns.input
            raise DpkdError(f"data.columns.input: no row of {self._settings.path} has a column {name!r}.")

    def _examples(self, row: RawRow | BadRow) -> list[Example] | BadRow:
        if isinstance(row, BadRow):
            return row
        columns, required = self._settings.columns, self._require_response
        if self._shape is None:
            self._shape = find_shape(row, columns, require_response=required)
            if self._shape is None:
                return BadRow(row.id, "missing field", f"only {', '.join(map(str, row.value)) or 'nothing'} given")
        self._input_seen = self._input_seen or columns.input in row.value
        every = self._settings.train_on == "all"
        found = to_examples(row, self._shape, require_response=required, every_turn=every)
        if self._teacher_column is None or isinstance(found, BadRow):
            return found
        name = check_text(row, self._teacher_column)
        return name if isinstance(name, BadRow) else [replace(example, teacher=name) for example in found]


def _bad_rows(source: str, bad: tuple[BadRow, ...], wording: Wording) -> DpkdError:
    count = f"{len(bad)} row{'s' if len(bad) > 1 else ''}"
    if len(bad) >= MOST_BAD_ROWS_SHOWN:
        count = f"at least {len(bad)} rows"
    return DpkdError(
        "\n".join(
            [
                f"{wording.path}: {count} of {source} cannot be read:",
                *(f"  {row}" for row in bad),
                f"Fix these rows, or skip and count them: {wording.settings(on_bad_row='skip')}",
            ]
        )
    )
