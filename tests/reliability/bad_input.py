"""Bad input, generated from a seed: settings, YAML, arguments, data, models, plugins, damaged folders.

A case is a family, a number and a seed, which decide all of it. The command runs in this process, with a limit of time
and memory. It may be accepted, or refused by a sentence and the exit code of the family; it must not end in a
traceback, in an error that no part of the command expected, in another exit code, in a hang, or with rows that are
lost.
"""

from __future__ import annotations

import csv
import io
import json
import os
import random
import resource
import shutil
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

from toy_commands import TRAIN, write_toy

LIMIT = 60.0  # seconds that a case may compute; what waits may do so for ten times as long, on a busy machine
MEMORY = 4 << 30  # bytes that a case may take
_command: Any = None
BAD = ("traceback", "hang", "unforeseen", "wrong code", "rows lost")


@dataclass(frozen=True)
class Case:
    """What is called in the case's folder; `codes` are the right exit codes, `check` looks at what was printed."""

    arguments: list[str]
    codes: tuple[int, ...]
    check: Callable[[int, str], str | None] = lambda code, text: None
    site: Path | None = None  # a folder of plugins to put on the path


@dataclass
class World:
    """A toy model, rows, a run and an evaluation, made once; cases work on copies of them."""

    root: Path
    paths: list[str] = field(default_factory=list)

    @classmethod
    def make(cls, root: Path) -> World:
        """The world of a folder, made there unless it is there already."""
        if not (root / "evaluation").is_dir():
            shutil.rmtree(root, ignore_errors=True)
            write_toy(root / "toy")
            work = root / "work"
            work.mkdir()
            evaluate = ["eval", "--model", "../toy/model", "--data", "../toy/data.jsonl", "--limit", "3"]
            for command in (TRAIN, [*evaluate, "--seeds", "1,2", "--max-new-tokens", "2", "--output", "scores"]):
                code, text = called(command, work)
                assert code == 0, text
            (work / "run").rename(root / "run")
            (root / "evaluation").mkdir()
            shutil.copytree(work / "scores", root / "run" / "eval" / "data")
            (work / "scores").rename(root / "evaluation" / "data")
        from dpkd.config.problems import all_paths
        from dpkd.config.settings import RunSettings

        sources = ["text.source", "text.mix", "text.sampling.temperature", "text.refresh", "text.num_generations"]
        losses = ["loss.name", "loss.kd_ratio", "loss.temperature", "loss"]
        return cls(root, [*all_paths(RunSettings), *sources, *losses])


class Hang(BaseException):
    """A command ran past its limit."""


@contextmanager
def limited(seconds: float) -> Iterator[None]:
    """Raise Hang after so many seconds of computing, or ten times as many, and MemoryError past the limit of memory."""

    def late(number: int, frame: Any) -> None:
        raise Hang

    timers = ((signal.SIGPROF, signal.ITIMER_PROF, seconds), (signal.SIGALRM, signal.ITIMER_REAL, 10 * seconds))
    before = [signal.signal(number, late) for number, _, _ in timers]
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, hard))
    for _, timer, limit in timers:
        signal.setitimer(timer, limit)
    try:
        yield
    finally:
        for (number, timer, _), handler in zip(timers, before, strict=True):
            signal.setitimer(timer, 0)
            signal.signal(number, handler)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def called(arguments: list[str], folder: Path, site: Path | None = None, limit: float = LIMIT) -> tuple[int | str, str]:
    """`dpkd ARGUMENTS` in a folder: its exit code (or `hang`, `traceback`), and what it printed."""
    import tempfile

    import typer.main

    from dpkd.cli.main import app, main

    global _command
    _command = _command or typer.main.get_command(app)  # made once: half of what a case would cost
    kept = os.getcwd(), sys.argv, list(sys.path), set(sys.modules), tempfile.tempdir
    printed = io.StringIO()
    os.chdir(folder)
    sys.argv = ["dpkd", *arguments]
    tempfile.tempdir = str(folder)
    os.environ["DPKD_CACHE"] = str(folder / "cache")
    if site is not None:
        sys.path.insert(0, str(site))
    code: int | str = 0
    try:
        made = mock.patch.object(typer.main, "get_command", return_value=_command)
        with redirect_stdout(printed), redirect_stderr(printed), made, limited(limit):
            main()
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except Hang:
        code = "hang"
    except BaseException as error:
        code, _ = "traceback", printed.write(f"\n{type(error).__name__}")
    finally:
        os.chdir(kept[0])
        sys.argv, sys.path[:], tempfile.tempdir = kept[1], kept[2], kept[4]
        if site is not None:
            for name in set(sys.modules) - kept[3]:
                if str(getattr(sys.modules[name], "__file__", None)).startswith(str(site)) or "bad_plugin" in name:
                    del sys.modules[name]
    return code, printed.getvalue()


def run(family: str, number: int, world: World, seed: int = 0) -> dict[str, Any]:
    """One case: what became of it, as a row of the log."""
    folder = world.root / "case"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    drawn = random.Random(f"{family} {number}" + f" {seed}" * (seed != 0))  # 0: the cases in docs/reliability.md
    case = FAMILIES[family](drawn, folder, world)
    code, text = called(case.arguments, folder, case.site)
    outcome = _outcome(case, code, text)
    row: dict[str, Any] = {"outcome": outcome, "code": code}
    if outcome in BAD:
        row |= {"arguments": [argument[:300] for argument in case.arguments], "text": text[-1500:]}
        row["file"] = "".join(p.read_text(errors="replace")[-2500:] for p in folder.glob("dpkd-error-*.txt"))
    return row


def _outcome(case: Case, code: int | str, text: str) -> str:
    if isinstance(code, str):
        return code
    if "Traceback (most recent call last)" in text:
        return "traceback"
    if "unexpected error, Hang" in text:
        return "hang"
    if "unexpected error, " in text:
        return "unforeseen"
    if code not in case.codes or (code and not text.strip()):
        return "wrong code"
    return case.check(code, text) or ("accepted" if code == 0 else "refused")


# ---- pieces of bad input

TEXTS = (
    "",
    " ",
    "\x1b[31mred",
    "\u202eabc",
    "é" * 40,
    "x" * 300,
    "../..",
    "/dev/zero",
    "null",
    "none",
    "{}",
    "[]",
    "a.b",
)
VALUES = (
    *("nan", ".nan", ".inf", "-.inf", "1e400", "-1", "0", "1", "2.5", "true", "null", "none", "[1, 1]", "{a: 1}", "[]"),
    *(
        "{}",
        "''",
        "9" * 5000,
        "-" + "9" * 300,
        "x" * 300,
        "!!int abc",
        "!!binary x",
        "!!map 3",
        "[[[[",
        "*a",
        "&a [*a]",
    ),
    *(
        "1e-400",
        "0x1f",
        "1_000",
        "\x1b[31m",
        "é\u202e",
        "!!python/name:os.system",
        "[nan]",
        "{a: {b: {c: 1}}}",
        "1e308",
    ),
    *(
        "[0.9, 1.0]",
        "[1]",
        "[null]",
        "{student: 2}",
        "{student: nan}",
        "kd",
        "cpu",
        "cuda:99",
        "a,b",
        "2024-01-01",
        "\x00",
    ),
)
JSON = (
    *(
        '{"a": 1',
        "[]",
        "{}",
        "null",
        "1",
        '"x"',
        "NaN",
        "[" * 3000,
        '{"a":' * 2000,
        "1" * 6000,
        "\\ud800",
        '{"a": NaN}',
    ),
    *(
        '{"prediction": "\\ud800"}',
        '{"prediction": 1}',
        '{"prediction": null}',
        '{"references": []}',
        "\x00",
        "\ufeff{}",
    ),
)


def _values(generator: random.Random) -> str:
    return generator.choice(VALUES)


def _damaged(generator: random.Random, content: bytes) -> bytes:
    """A file's content with one thing wrong."""
    kind = generator.randrange(12)
    at = generator.randrange(len(content) + 1)
    text = content.decode("utf-8", "replace")
    if kind == 0:
        return b""
    if kind == 1:
        return content[:at]
    if kind == 2:
        return content[:at] + bytes([generator.randrange(256)]) + content[at + 1 :]
    if kind == 3:
        return content[:at] + b"\x00\xff\xfe" + content[at:]
    if kind == 4:
        return bytes(generator.randrange(256) for _ in range(200))
    if kind == 5:
        return generator.choice(JSON).encode("utf-8", "surrogatepass")
    if kind == 6:
        return b"\xef\xbb\xbf" + content
    if kind == 7:
        return content + content
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):  # damaged before, perhaps into something too deep
        lines = text.splitlines()
        if not lines:
            return b"\n"
        line = generator.randrange(len(lines))
        try:
            lines[line] = json.dumps(_altered(generator, json.loads(lines[line])))
        except (ValueError, RecursionError):
            lines[line] = generator.choice((*VALUES, *JSON, *TEXTS))
        return "\n".join(lines).encode("utf-8", "surrogatepass")
    return json.dumps(_altered(generator, value)).encode()


def _altered(generator: random.Random, value: Any) -> Any:
    """A JSON value with one place in it of another type, or left out."""
    if isinstance(value, dict) and value and generator.random() < 0.8:
        key = generator.choice(sorted(value))
        if generator.random() < 0.2:
            return {name: item for name, item in value.items() if name != key}
        return {**value, key: _altered(generator, value[key])}
    if isinstance(value, list) and value and generator.random() < 0.8:
        at = generator.randrange(len(value))
        return [*value[:at], _altered(generator, value[at]), *value[at + 1 :]]
    return generator.choice(
        (None, 1, -1, 1.5, float("nan"), float("inf"), 10**30, True, "x", "", [], {}, [1], {"a": 1})
    )


def _odd_path(generator: random.Random, folder: Path) -> str:
    """A path that is no file as it should be."""
    name = generator.choice(("pipe", "folder", "missing", "long", "nul", "zero", "socket", "loop", "empty", "closed"))
    path = folder / f"{name}{generator.choice(('.jsonl', '.json', '.csv', '.txt', '.parquet', '.yaml', ''))}"
    if name == "pipe":
        os.mkfifo(path)
    elif name == "folder":
        path.mkdir()
    elif name == "long":
        return "n" * 300 + path.suffix
    elif name == "nul":
        return f"a\x00b{path.suffix}"
    elif name == "zero":
        path.symlink_to("/dev/zero")
    elif name == "socket":
        here = os.getcwd()
        os.chdir(folder)  # the name of a socket may have 108 bytes at most
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(path.name)
        os.chdir(here)
    elif name == "loop":
        path.symlink_to(path.name)
    elif name == "empty":
        path.touch()
    elif name == "closed":
        path.write_text("{}")
        path.chmod(0)
    return str(path)


# ---- the families

SHOW = ["config", "show", "--loss", "kd", "--teacher", "t", "--student", "s"]


def settings(generator: random.Random, folder: Path, world: World) -> Case:
    """`--set` with right and wrong paths and odd values."""
    sets = []
    for _ in range(generator.randrange(1, 4)):
        path = generator.choice(world.paths)
        kind = generator.randrange(8)
        if kind == 0:
            at = generator.randrange(len(path))
            path = path[:at] + generator.choice("xé. -\x1b") + path[at + 1 :]
        elif kind == 1:
            path = generator.choice((f"{path}.x", "x." * 200 + "x", "x" * 5000, "", ".", "=", f"{path}.0", "\x00"))
        sets += ["--set", f"{path}={_values(generator)}"]
    return Case([*SHOW, *sets], (0, 2))


def yaml_files(generator: random.Random, folder: Path, world: World) -> Case:
    """Files of settings: damaged, huge, deep, or no files."""
    good = (world.root / "run" / "config.resolved.yaml").read_bytes()
    kind = generator.randrange(8)
    size = generator.choice((10, 1000, 5000))
    aliases = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
        f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12)
    )
    contents: dict[int, Callable[[], bytes]] = {
        0: lambda: aliases.encode(),
        1: lambda: "".join(f"{generator.choice(('train', 'key'))}_{i}: 1\n" for i in range(size)).encode(),
        2: lambda: (generator.choice(("[", "{a: ", "- ", "[{a: ")) * size).encode(),
        3: lambda: f"train: {{lr: {_values(generator)}}}\n{generator.choice(world.paths).split('.')[0]}: 1".encode(),
        4: lambda: f"{_values(generator)}: {_values(generator)}".encode(),
    }
    path = folder / "settings.yaml"
    if kind == 7:
        return Case(["config", "show", "--config", _odd_path(generator, folder)], (0, 2))
    path.write_bytes(contents.get(kind, lambda: _damaged(generator, good))())
    return Case(["config", "show", "--config", str(path)], (0, 2))


def sweeps(generator: random.Random, folder: Path, world: World) -> Case:
    """Files of sweeps."""
    good: dict[str, Any] = {
        "output": "out",
        "settings": {"teacher.model": "t", "student.model": "s", "loss.name": "kd"},
        "stages": {"a": {"matrix": {"train.lr": [0.1, 0.2]}}, "b": {"settings": {"student.model": "{a}"}}},
        "evaluate": {"data": ["d.jsonl"], "options": {"seeds": "1"}},
    }
    content = json.dumps(good).encode()
    for _ in range(generator.randrange(1, 3)):
        content = _damaged(generator, content)
    path = folder / "sweep.yaml"
    path.write_bytes(content)
    odd = generator.random() < 0.1
    return Case(["sweep", _odd_path(generator, folder) if odd else str(path), "--dry-run"], (0, 2))


def predictions(generator: random.Random, folder: Path, world: World) -> Case:
    """Files for `score`: no row is lost or counted twice."""
    if generator.random() < 0.2:
        return Case(["score", _odd_path(generator, folder)], (0, 1, 2))
    rows = [
        {"id": str(i), "prediction": f"a {i}", "references": [generator.choice(("a b", "", "\u2028", "x" * 9))]}
        for i in range(generator.randrange(1, 9))
    ]
    content = "".join(json.dumps(row, ensure_ascii=generator.random() < 0.5) + "\n" for row in rows).encode()
    if is_bad := generator.random() < 0.8:
        content = _damaged(generator, content)
    path = folder / f"p{generator.choice(('.jsonl', '.jsonl', '.json', '.txt'))}"
    path.write_bytes(content)
    arguments = ["score", str(path), "--json", *([str(path)] if generator.random() < 0.3 else [])]

    def counted(code: int, text: str) -> str | None:
        if code or is_bad:
            return None if code or not is_bad or path.suffix != ".jsonl" else _same(text, _lines(content))
        return _same(text, len(rows)) if path.suffix == ".jsonl" else None

    return Case(arguments, (0, 1, 2), counted)


def _lines(content: bytes) -> int:
    return sum(bool(line.strip()) for line in content.removeprefix(b"\xef\xbb\xbf").split(b"\n"))


def _same(text: str, rows: int) -> str | None:
    return None if json.loads(text[text.index("{") :])["rows"] == rows else "rows lost"


def data(generator: random.Random, folder: Path, world: World) -> Case:
    """Training data of every format, for a dry run."""
    base = ["train", "--loss", "sft", "--student", str(world.root / "toy" / "model"), "--dry-run"]
    if generator.random() < 0.2:
        return Case([*base, "--data", _odd_path(generator, folder)], (0, 1, 2))
    rows = [{"prompt": f"p {i}", "response": f"r {i}"} for i in range(generator.randrange(1, 6))]
    suffix = generator.choice((".jsonl", ".json", ".csv"))
    content = "".join(json.dumps(row) + "\n" for row in rows).encode()
    if suffix == ".json":
        content = json.dumps(rows).encode()
    if suffix == ".csv":
        text = io.StringIO()
        writer = csv.DictWriter(text, ["prompt", "response"])
        writer.writeheader()
        writer.writerows(rows)
        content = text.getvalue().encode()
    path = folder / f"rows{suffix}"
    path.write_bytes(_damaged(generator, content))
    skip = ["--set", "data.on_bad_row=skip"] if generator.random() < 0.5 else []
    return Case([*base, "--data", str(path), *skip], (0, 1, 2))


def models(generator: random.Random, folder: Path, world: World) -> Case:
    """A model's folder with one file damaged, lost, or exchanged for a pickle."""
    model = folder / "model"
    shutil.copytree(world.root / "toy" / "model", model)
    file = generator.choice(sorted(model.iterdir()))
    kind = generator.randrange(6)
    if kind == 0:
        file.unlink()
    elif kind == 1:
        (model / "model.safetensors").unlink()
        (model / "pytorch_model.bin").write_bytes(b"\x80\x04N.")
    else:
        file.write_bytes(_damaged(generator, file.read_bytes()))
    rows = str(world.root / "toy" / "data.jsonl")
    sample = ["sample", "--model", str(model), "--data", rows, "--limit", "1", "--max-new-tokens", "1"]
    return Case([*sample, "--output", "out.jsonl"], (0, 1, 2))


def folders(generator: random.Random, folder: Path, world: World) -> Case:
    """Commands that read the folders of runs and evaluations, of which files are damaged or lost."""
    kind = generator.choice(("run", "evaluation"))
    copy = folder / kind
    shutil.copytree(world.root / kind, copy)
    files = sorted(
        p for p in copy.rglob("*") if p.is_file() and "checkpoints" not in p.parts and "model" not in p.parts
    )
    for _ in range(generator.randrange(1, 3)):
        file = generator.choice(files)
        if file.is_dir():  # damaged before
            continue
        if generator.random() < 0.15:
            file.unlink(missing_ok=True)
        elif generator.random() < 0.1:
            file.unlink(missing_ok=True)
            file.mkdir(exist_ok=True)
        elif file.is_file():
            file.write_bytes(_damaged(generator, file.read_bytes()))
    compare = ["compare", kind, "--resamples", "100", "--format"]
    commands = [
        [*compare, generator.choice(("table", "json", "csv", "latex", "markdown"))],
        ["report", kind, "--no-figures"],
        ["train", "--resume", kind, "--set", "train.steps=0"],
        ["eval", "--model", kind, "--data", "missing.jsonl"],
    ]
    return Case(commands[generator.choice((0, 0, 0, 1, 1, 2, 3))], (0, 1, 2))


def arguments(generator: random.Random, folder: Path, world: World) -> Case:
    """Options of every command with values that they cannot have."""
    from typer.main import get_command

    from dpkd.cli.main import app

    tree: dict[str, Any] = dict(get_command(app).commands)  # type: ignore[attr-defined]
    tree |= {f"config {name}": command for name, command in tree.pop("config").commands.items()}
    name = generator.choice(sorted(set(tree) - {"demo", "judge", "check-loss", "sample", "cache", "eval", "train"}))
    if generator.random() < 0.3:
        name = generator.choice(("sample", "cache", "eval", "judge", "train"))
    given = name.split()
    for parameter in tree[name].params:
        value = generator.choice((*TEXTS, *VALUES, "missing.jsonl", str(folder), "kd", "-5"))
        if parameter.param_type_name == "argument":
            given.append(value)
        elif generator.random() < 0.3 and parameter.opts[0] not in ("--help", "--endpoint"):
            given += [parameter.opts[0]] if getattr(parameter, "is_flag", False) else [parameter.opts[0], value]
    if name == "judge":
        given += ["--endpoint", generator.choice(("x", "http://127.0.0.1:1", "ftp://a", "http://[", "\x00"))]
        given += ["--attempts", "1"]
    return Case(given, (0, 1, 2))


# ---- plugins

MODULE = """
from dpkd.api import Card, LossConfig, LossSpec, Signal, Source, TokenLoss, hookimpl, setting
TOP

class Unshowable(Exception):
    def __str__(self):
        raise SystemExit(0)

class Config(LossConfig):
    strength: float = setting(0.5, description="how strong", source="made up", gt=0, lt=1)
    CONFIG

class Bad(TokenLoss[Config]):
    def forward(self, x):
        values = x.student_logits.logsumexp(-1)
        FORWARD
        return values

CARD = Card("A fake", "Nothing.", "0", (Source("No paper", "https://example.org/none"),), "never", "always")
SPEC = LossSpec(name="bad", loss=Bad, config=Config, reads=frozenset({Signal.STUDENT_LOGITS}), card=CARD)
SPECS = [SPEC]

@hookimpl
def dpkd_losses():
    HOOK
    return SPECS
"""
RAISES = (
    *("raise ValueError('no')", "raise KeyError('x')", "raise KeyboardInterrupt", "raise BaseException('b')", "1 / 0"),
    *("raise GeneratorExit", "raise SystemExit(0)", "import sys; sys.exit(0)", "import no_such_module", "assert False"),
    *("raise type('U', (Exception,), {'__str__': lambda s: 1 / 0})()", "raise MemoryError", "raise RecursionError"),
    *("raise OSError(28, 'full')", "raise StopIteration", "raise UnicodeError('\\ud800')", "print('noise')"),
)
FORWARDS = (
    *("values = values.mean()", "values = values.detach()", "values = values[:-1]", "values = values.unsqueeze(0)"),
    *("values = None", "values = 1.0", "values = values.argmax()", "values = values.long()", "values = [values]"),
    *("values = values * float('nan')", "values = values.sum().expand(3)", "values = values.tolist()", "x.targets"),
    *("import torch; values = torch.zeros(len(values))", "raise x.no_such", "values = values.to('meta')"),
)
SPECS = (
    *(
        "None",
        "[None]",
        "'bad'",
        "{}",
        "5",
        "[SPEC, SPEC]",
        "iter([SPEC])",
        "(1 / 0 for _ in [1])",
        "[CARD]",
        "[[SPEC]]",
    ),
    *("[LossSpec('Bad Name', Bad, Config, CARD, frozenset())]", "[LossSpec('bad', None, Config, CARD, frozenset())]"),
    *("[LossSpec('bad', Bad, dict, CARD, frozenset())]", "[LossSpec('bad', Bad, Config, None, frozenset())]"),
    *("[LossSpec('bad', Bad, Config, CARD, None)]", "[LossSpec('bad', Bad, Config, CARD, lambda c: 1 / 0)]"),
    *("[LossSpec('bad', Bad, Config, CARD, {'x'})]", "[LossSpec('bad', Bad, Config, CARD, {1}, suggests=5)]"),
    *("[LossSpec('', Bad, Config, CARD, frozenset())]", "[LossSpec('b' * 300, Bad, Config, CARD, frozenset())]"),
    *("[LossSpec('bad', Bad, Config, CARD, frozenset({Signal.STUDENT_LOGITS}), suggests={'train': 5})]",),
    *("[LossSpec('bad', Bad, Config, CARD, frozenset({Signal.STUDENT_LOGITS}), suggests={'x.y': [1]})]",),
    *("[LossSpec('bad', Bad, Config, CARD, frozenset({Signal.STUDENT_LOGITS}), accepts=None)]",),
    *("[LossSpec('bad', Bad, Config, CARD, frozenset({Signal.STUDENT_LOGITS}), traits=3, top_k=4)]",),
)
CONFIGS = (
    *("other: int = 1 / 0", "other: int", "def __init__(self, **x): raise ValueError('init')", "strength: str = 5"),
    *(
        "def __init__(self, **x): raise SystemExit(0)",
        "def model_dump(self, **x): return None",
        "other: object = object()",
    ),
    *("def __repr__(self): return 1 / 0", "def __eq__(self, other): raise KeyError", "class Config: extra = 'allow'"),
    *(
        "def model_post_init(self, context): raise KeyboardInterrupt",
        "def model_post_init(self, c): raise KeyError('p')",
    ),
)


def plugins(generator: random.Random, folder: Path, world: World) -> Case:
    """A loss of somebody that fails at import, at its hook, in its spec, in its config, or in forward."""
    place = generator.choice(("TOP", "HOOK", "SPECS", "CONFIG", "FORWARD"))
    line = generator.choice({"SPECS": SPECS, "CONFIG": CONFIGS, "FORWARD": (*FORWARDS, *RAISES)}.get(place, RAISES))
    source = MODULE.replace("SPECS = [SPEC]", f"SPECS = {line}") if place == "SPECS" else MODULE.replace(place, line, 1)
    for other in ("TOP", "HOOK", "CONFIG", "FORWARD"):
        source = source.replace(f"    {other}\n", "").replace(f"{other}\n", "\n", 1) if other != place else source
    if generator.random() < 0.1:
        source = _damaged(generator, source.encode()).decode("utf-8", "replace")
    site = folder / "site"
    info = site / "bad_plugin-1.0.dist-info"
    info.mkdir(parents=True)
    (site / "bad_plugin.py").write_text(source, encoding="utf-8", errors="replace")
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: bad-plugin\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[dpkd]\nbad = bad_plugin\n")
    toy = world.root / "toy"
    train = [
        *(
            "train",
            "--loss",
            "bad",
            "--student",
            str(toy / "model"),
            "--data",
            str(toy / "data.jsonl"),
            "--output",
            "o",
        ),
        *("--set", "train.steps=1", "--set", "train.device=cpu", "--set", "train.batch_size=2"),
    ]
    commands = (["list-losses", "--json"], ["describe-loss", "bad"], ["config", "show", "--loss", "bad"], train)
    command = train if place == "FORWARD" else generator.choice((*commands[:3], *commands[:3], train))

    def done(code: int, text: str) -> str | None:
        """A loss that others install never stops the list; a run that failed does not say that all is well."""
        if command[0] == "list-losses":
            return None if code == 0 else "wrong code"
        ended = command is train and code == 0 and not (folder / "o" / "model").is_dir()
        return "wrong code" if ended else None

    return Case(command, (0, 1, 2, 130), done, site)


FAMILIES: dict[str, Callable[[random.Random, Path, World], Case]] = {
    one.__name__: one for one in (settings, yaml_files, sweeps, predictions, data, models, folders, arguments, plugins)
}
# Of 10,000 cases; those that load a model cost most.
SHARES = {
    "settings": 2600,
    "yaml_files": 1500,
    "sweeps": 700,
    "predictions": 1500,
    "data": 500,
    "models": 300,
    "folders": 1400,
    "arguments": 1000,
    "plugins": 500,
}


def cases(count: int) -> Iterator[tuple[str, int]]:
    """About `count` cases, the families side by side."""
    numbers = [
        (number / share, family, number)
        for family, share in SHARES.items()
        for number in range(max(1, share * count // sum(SHARES.values())))
    ]
    for _, family, number in sorted(numbers):
        yield family, number
