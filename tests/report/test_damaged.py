"""Run folders damaged at random: every command on them succeeds or says one sentence that names the file."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from report_folders import add_dev, add_scores, lines, make_run

from dpkd.errors import DpkdError
from dpkd.evaluation.target import find_target
from dpkd.report import sections, texts
from dpkd.report.card import rescore
from dpkd.report.charts import chapters, length_panels
from dpkd.report.comparison import compare
from dpkd.report.comparison_text import as_csv, as_json, as_latex, as_markdown
from dpkd.report.page import page
from dpkd.report.reading import Run, read_runs
from dpkd.report.token_rewards import answers_of

CASES = 250
PAGES = 5
VALUES: list[Any] = [
    None,
    True,
    -1,
    10**400,
    1e308,
    float("nan"),
    float("inf"),
    "",
    "x",
    "NaN",
    [],
    [[]],
    {},
    {"a": []},
]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs with everything that a report reads."""
    folder = tmp_path_factory.mktemp("whole")
    for name in ("a", "b"):
        path = make_run(folder / name)
        add_dev(path)
        add_scores(path / "eval", {10: [20.0, 30.0], 20: [22.0, 31.0]})
        lines(path / "eval" / "dolly" / "teacher" / "predictions-10.jsonl", [{"id": "r:0", "prediction": "theirs"}])
        tokens = [{"text": " a", "reward": 0.5}, {"text": "\n", "reward": -0.25}]
        (path / "token_rewards.json").write_text(json.dumps([{"prompt": "P", "writer": "student", "tokens": tokens}]))
    return folder


def torn(data: bytes, rng: random.Random) -> bytes:
    return data[: rng.randrange(len(data) + 1)]


def flipped(data: bytes, rng: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        changed[rng.randrange(len(changed))] = rng.randrange(256)
    return bytes(changed)


def cut_out(data: bytes, rng: random.Random) -> bytes:
    start = rng.randrange(len(data))
    return data[:start] + data[start + rng.randint(1, 40) :]


def another_value(data: bytes, rng: random.Random) -> bytes:
    """One value somewhere in a JSON document, or in one of its lines, becomes another one."""
    try:
        parts: list[Any] = [json.loads(line) for line in data.splitlines() if line.strip()]
    except ValueError:
        try:
            parts = [json.loads(data)]
        except ValueError:  # YAML: a value after a colon
            rows = data.decode().splitlines()
            place = rng.randrange(len(rows))
            rows[place] = (
                f"{rows[place].split(':')[0]}: {rng.choice(['[1, 2]', '{x: 1}', '*a', '&a [*a]', '!!x y', '1' * 5000])}"
            )
            return "\n".join(rows).encode()
    holder: Any = parts
    while True:
        key = rng.choice(list(holder) if isinstance(holder, dict) else range(len(holder)))
        if not (isinstance(holder[key], dict | list) and holder[key]) or rng.random() < 0.3:
            holder[key] = rng.choice(VALUES)
            return "\n".join(map(json.dumps, parts)).encode()
        holder = holder[key]


def nested(data: bytes, rng: random.Random) -> bytes:
    return rng.choice([b"[", b'{"a":', b"- ", b"a: ["]) * 5000


def replaced(data: bytes, rng: random.Random) -> bytes:
    return rng.choice(
        [b"", b"\n", b"\x00" * 64, b"\xff\xfe{}", b"null", b"[]", b"{}", b"3", b'"text"', b"[NaN]", b"x: [", b"---\n"]
    )


DAMAGES: list[Callable[[bytes, random.Random], bytes]] = [
    torn,
    flipped,
    cut_out,
    another_value,
    another_value,
    nested,
    replaced,
]


def damage(folder: Path, rng: random.Random) -> str:
    """Damage one file of the first run; says which and how."""
    files = sorted(file for file in (folder / "a").rglob("*") if file.is_file())
    file = rng.choice(files)
    how = rng.choice([*DAMAGES, None, None])
    if how is not None:
        file.write_bytes(how(file.read_bytes(), rng))
        return f"{file.relative_to(folder)}: {how.__name__}"
    file.unlink()
    if rng.random() < 0.5:
        file.mkdir()
        return f"{file.relative_to(folder)}: a folder"
    return f"{file.relative_to(folder)}: gone"


def everything_but_drawing(runs: list[Run]) -> None:
    for own in ([runs[0]], runs):
        for part in (
            sections.overview,
            sections.scores,
            sections.settings,
            sections.technical,
            texts.samples,
            texts.tokens,
        ):
            part(own)
        sections.subtitle(own)
        chapters(own)
        length_panels(own)


def compared(runs: list[Run]) -> None:
    found = compare(runs, "b", metrics=("all",), resamples=100)
    for write in (as_markdown, as_csv, as_latex, as_json):
        write(found)


def sentence(folder: Path, work: Callable[[], object]) -> bool:
    """Whether it was refused, which must be in one short line that names what is damaged."""
    try:
        work()
    except DpkdError as error:
        text = str(error)
        assert len(text.splitlines()) == 1, text
        assert len(text) < 1000, text[:2000]
        assert str(folder) in text or "scores" in text or "answers" in text, text
        return True
    return False


def refusals(folder: Path, *, drawn: bool) -> list[bool]:
    """What each command said of the runs in a folder."""
    runs: list[Run] = []
    if sentence(folder, lambda: runs.extend(read_runs([folder / "a", folder / "b"]))):
        return [True]
    work = [
        lambda: everything_but_drawing(runs),
        lambda: compared(runs),
        lambda: rescore(folder / "a"),
        lambda: answers_of(runs[0], 2),
        *([lambda: page(runs[:1])] if drawn else []),
    ]
    return [sentence(folder, one) for one in work]


def test_no_damage_ends_in_a_traceback(whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "runs"
    refused, failed = 0, []
    for seed in range(CASES):
        shutil.copytree(whole, folder)
        told = damage(folder, random.Random(seed))
        try:
            refused += any(refusals(folder, drawn=seed % (CASES // PAGES) == 0))
        except Exception as error:
            failed.append(f"case {seed}: {told}: {type(error).__name__}: {error}"[:300])
        shutil.rmtree(folder)
    assert not failed, "\n".join(failed)
    assert CASES // 10 < refused < CASES - CASES // 10


@pytest.mark.parametrize("text", ["[1]", "loss: 3", "a: [", "a: &x [*x]", "\x00", "teacher: {model: [1]}", "data: x"])
def test_a_run_with_damaged_settings_is_no_target_of_eval(whole: Path, tmp_path: Path, text: str) -> None:
    shutil.copytree(whole / "a", tmp_path / "a")
    (tmp_path / "a" / "model").mkdir()
    (tmp_path / "a" / "config.resolved.yaml").write_text(text)
    with pytest.raises(DpkdError, match=r"config\.resolved\.yaml: damaged|teacher\.model"):
        find_target(str(tmp_path / "a"), None)
