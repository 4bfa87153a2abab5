"""Files of predictions and of references: ours are written here, anybody's are read.

A line of ours is `{"id", "prompt", "prediction", "references", "seed", ...}`; what has no value is left out.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dpkd.errors import DpkdError
from dpkd.evaluation.rows import read_rows
from dpkd.io import dumps, sha256, write_text

_PREDICTION_KEYS = ("output", "response", "completion", "generated_text", "text")
_REFERENCE_KEYS = ("reference", "output", "response", "answer", "target", "text")
# In the folder of an evaluation, that of the teacher's answers.
TEACHER = "teacher"
_OWN_KEYS = ("id", "prompt", "prediction", "references", "seed")


@dataclass(frozen=True)
class Prediction:
    """One generated answer; `extra` has other fields of its line, `where` the place it was read from."""

    prediction: str
    id: str | None = None
    prompt: str | None = None
    references: tuple[str, ...] = ()
    seed: int | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)
    where: str = field(default="", compare=False)

    def as_dict(self) -> dict[str, Any]:
        """The fields that have a value, ready for JSON."""
        own: dict[str, Any] = {
            "id": self.id,
            "prompt": self.prompt,
            "prediction": self.prediction,
            "references": list(self.references) or None,
            "seed": self.seed,
        }
        own = {name: value for name, value in own.items() if value is not None}
        return own | {name: value for name, value in self.extra.items() if name not in _OWN_KEYS}


@dataclass(frozen=True)
class References:
    """The accepted answers of one row, at least one."""

    texts: tuple[str, ...]
    id: str | None = None
    where: str = field(default="", compare=False)


def write_predictions(path: Path, rows: Iterable[Prediction]) -> None:
    """Write JSON lines; the file appears whole or not at all."""
    write_text(path, "".join(f"{dumps(row.as_dict())}\n" for row in rows))


def read_predictions(path: Path) -> list[Prediction]:
    """Predictions of a file of ours, or of another tool, in order.

    A JSON row holds the answer as `prediction`, or else as one of `output`, `response`, `completion`,
    `generated_text`, `text`; a row may be a bare text; a plain-text file has one answer a line.

    Raises DpkdError with file and line for a row that has no answer, two, or one that is not text.
    """
    return [_prediction(row, place) for place, row in read_rows(path)]


def read_references(path: Path) -> list[References]:
    """Accepted answers of a file, in order.

    A JSON row holds them as `references`, or else as one of `reference`, `output` (Dolly's), `response`,
    `answer`, `target`, `text`: a text or a list of texts; a row may be that value itself; a plain-text file
    has one reference a line.

    Raises DpkdError with file and line for a row without a reference, or with one that is not text.
    """
    return [_references(row, place) for place, row in read_rows(path)]


def own_references(predictions: Sequence[Prediction]) -> list[tuple[str, ...]]:
    """The references inside the predictions. Raises DpkdError, naming the first row, where there are none."""
    without = [row for row in predictions if not row.references]
    if without:
        raise DpkdError(
            f"{without[0].where}: no `references` here, as in {len(without)} of {len(predictions)} rows. "
            "Name a file of references after the file of predictions."
        )
    return [row.references for row in predictions]


def match_references(predictions: Sequence[Prediction], references: Sequence[References]) -> list[tuple[str, ...]]:
    """The references of each prediction: by id where every row of both sides has one, else by position.

    By id, a file may hold several seeds, each of which answers every row once.
    Raises DpkdError when ids are missing, unknown or repeated, or counts differ.
    """
    ids = [row.id for row in predictions] + [row.id for row in references]
    if None not in ids:
        return _match_by_id(predictions, references)
    if len(predictions) != len(references):
        raise DpkdError(
            f"{len(predictions)} predictions ({_file(predictions)}) but {len(references)} rows of references "
            f"({_file(references)}): expected as many, in the same order. "
            "Give both an `id` to match rows by it; in plain text every line break starts a new row."
        )
    return [row.texts for row in references]


def _match_by_id(predictions: Sequence[Prediction], references: Sequence[References]) -> list[tuple[str, ...]]:
    by_id = {row.id: row.texts for row in references}
    twice = [name for name, count in Counter(row.id for row in references).items() if count > 1]
    if twice:
        raise DpkdError(f"{_file(references)}: {len(twice)} ids occur in several rows: {_some(twice)}")
    seeds: dict[int | None, list[str | None]] = {}
    for row in predictions:
        seeds.setdefault(row.seed, []).append(row.id)
    for seed, ids in seeds.items():
        problems = {
            "have no prediction": [name for name in by_id if name not in set(ids)],
            "have no reference": [name for name in ids if name not in by_id],
            "are predicted more than once": [name for name, count in Counter(ids).items() if count > 1],
        }
        found = [f"{len(names)} ids {what}: {_some(names)}" for what, names in problems.items() if names]
        if found:
            of_seed = "" if seed is None else f" of seed {seed}"
            raise DpkdError(
                f"{len(ids)} predictions{of_seed} ({_file(predictions)}) do not fit {len(references)} rows "
                f"of references ({_file(references)}): {'; '.join(found)}"
            )
    return [by_id[row.id] for row in predictions]


def _prediction(row: Any, place: str) -> Prediction:
    if isinstance(row, str):
        return Prediction(row, where=place)
    key = _key_of(row, place, "prediction", _PREDICTION_KEYS)
    own = {key, *_OWN_KEYS}
    prompt, wanted = row.get("prompt"), row.get("references")
    return Prediction(
        prediction=_text(row[key], f"{place}: `{key}`"),
        id=_id(row, place),
        prompt=None if prompt is None else _text(prompt, f"{place}: `prompt`"),
        references=() if wanted is None else _texts(wanted, f"{place}: `references`"),
        seed=_seed(row, place),
        extra={name: value for name, value in row.items() if name not in own},
        where=place,
    )


def _references(row: Any, place: str) -> References:
    if isinstance(row, str | list):
        return References(_texts(row, place), where=place)
    key = _key_of(row, place, "references", _REFERENCE_KEYS)
    return References(_texts(row[key], f"{place}: `{key}`"), _id(row, place), place)


def _key_of(row: Any, place: str, first: str, others: Sequence[str]) -> str:
    """The one key that holds the answer: `first` where present, else the only one of the others."""
    if not isinstance(row, dict):
        raise DpkdError(f"{place}: expected an object or a text, found {_kind(row)}")
    if first in row:
        return first
    present = [key for key in others if key in row]
    if len(present) == 1:
        return present[0]
    names = ", ".join(f"`{key}`" for key in (present or row)) or "nothing"
    wanted = ", ".join(f"`{key}`" for key in (first, *others))
    if present:
        raise DpkdError(f"{place}: {names} could each be the answer. Rename the right one to `{first}`.")
    raise DpkdError(f"{place}: expected one of {wanted}, found {names}")


def _texts(value: Any, what: str) -> tuple[str, ...]:
    if isinstance(value, str):
        return (value,)
    if not isinstance(value, list) or not value:
        found = "an empty list" if value == [] else _kind(value)
        raise DpkdError(f"{what}: expected a text or a list of at least one text, found {found}")
    return tuple(_text(item, f"{what}, item {i}") for i, item in enumerate(value, start=1))


def _text(value: Any, what: str) -> str:
    if not isinstance(value, str):
        raise DpkdError(f"{what}: expected a text, found {_kind(value)}")
    return value


def _id(row: Mapping[str, Any], place: str) -> str | None:
    value = row.get("id")
    if value is not None and (isinstance(value, bool) or not isinstance(value, str | int)):
        raise DpkdError(f"{place}: `id`: expected a text or a whole number, found {_kind(value)}")
    return None if value is None else str(value)


def _seed(row: Mapping[str, Any], place: str) -> int | None:
    value = row.get("seed")
    if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
        raise DpkdError(f"{place}: `seed`: expected a whole number, found {_kind(value)}")
    return value


def _kind(value: Any) -> str:
    names = {bool: "true or false", int: "a number", float: "a number", str: "a text", list: "a list"}
    return "null" if value is None else names.get(type(value), "an object")


def _file(rows: Sequence[Prediction] | Sequence[References]) -> str:
    place = rows[0].where if rows else ""
    return place.rsplit(", row ", 1)[0].rsplit(":", 1)[0] or "given in memory"


def _some(names: Sequence[str | None]) -> str:
    shown = ", ".join(str(name) for name in names[:3])
    return f"{shown}, …" if len(names) > 3 else shown


def check_answers(file: Path, scores: Mapping[str, Any]) -> None:
    """Raises DpkdError when a file of answers is not the one that the scores beside it were computed from."""
    expected = scores.get("files", {}).get(file.name)
    if expected is not None and sha256(file) != expected:
        raise DpkdError(
            f"{file} is damaged: its checksum is not the one in scores.json. Delete it and run `dpkd eval` again: only "
            "what is missing is sampled."
        )
