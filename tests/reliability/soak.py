"""`make soak`: kills, faults and damage over every command that writes; what became of each case is counted.

    python tests/reliability/soak.py --minutes 30 --output soak

A case runs a command under a fault, then again without one, and compares what is left with what an undisturbed command
leaves. Outcomes: identical; refused (a sentence, exit 1 or 2); and what must not be: different, traceback, hang.
Then come generated cases of bad input (bad_input.py).
Finished cases are in OUTPUT/cases.jsonl: a second call goes on with the rest.
"""

from __future__ import annotations

import argparse
import random
import shutil
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import bad_input
from faults import Fault, SweepOutcome, dpkd
from toy_commands import LIMITS, TRAIN, fingerprint, write_toy

from dpkd.io import JsonLog

EVAL = [
    *("eval", "--model", "../toy/model", "--data", "../toy/data.jsonl", "--output", "scores", "--seeds", "1,2"),
    *("--max-new-tokens", "4", "--teacher", "../toy/model", "--limit", "6"),
]
SAMPLE = [
    *("sample", "--model", "../toy/model", "--data", "../toy/data.jsonl", "--output", "answers.jsonl"),
    *("--max-new-tokens", "4", "--batch-size", "1"),
]
CACHE = [
    *("cache", "--loss", "kd", "--teacher", "../toy/model", "--data", "../toy/data.jsonl", "--output", "store"),
    *("--set", "student.init=layers", "--set", "student.layers=1", "--kind", "sampled", "--k", "8", *LIMITS),
]
RESUME = ["train", "--resume", "run"]
EXTEND = [*RESUME, "--set", "train.steps=6"]


@dataclass(frozen=True)
class Scenario:
    """A command, and what is called after a fault; `prepare` makes the folder that it works on."""

    name: str
    command: Sequence[str]
    again: Sequence[str]
    result: str
    prepare: Sequence[Sequence[str]] = ()
    killed: float | None = None  # the last of these is killed after this share of its calls


SCENARIOS = (
    Scenario("train", TRAIN, RESUME, "run"),
    Scenario("resume", RESUME, RESUME, "run", prepare=[TRAIN], killed=0.6),
    Scenario("extend", EXTEND, EXTEND, "run", prepare=[TRAIN]),
    Scenario("eval", EVAL, EVAL, "scores"),
    Scenario("sample", SAMPLE, SAMPLE, "."),
    Scenario("cache", CACHE, CACHE, "store"),
    Scenario("report", ["report", "run", "--no-figures"], ["report", "run", "--no-figures"], "run", prepare=[TRAIN]),
    Scenario(
        "compare",
        ["compare", "scores", "--format", "csv", "--output", "table.csv"],
        ["compare", "scores", "--format", "csv", "--output", "table.csv"],
        ".",
        prepare=[EVAL],
    ),
)


class Soak:
    """The cases of a scenario, each in a folder of its own that goes when it is done."""

    def __init__(self, output: Path, scenario: Scenario) -> None:
        self.output, self.scenario = output, scenario
        self.start = output / f"{scenario.name}-start"  # what `prepare` makes
        self.whole = output / f"{scenario.name}-whole"  # what the undisturbed command leaves
        self.calls = 0

    def undisturbed(self) -> None:
        """Run the command without a fault, for what it leaves and for how many calls it makes."""
        for folder in (self.start, self.whole):
            shutil.rmtree(folder, ignore_errors=True)
        self.start.mkdir(parents=True)
        for command in self.scenario.prepare:
            made = dpkd(command, self.start)
            assert made.kind == "ok", made.text
        if self.scenario.killed is not None:
            shutil.rmtree(self.start)
            dpkd(self.scenario.prepare[-1], self.start, Fault("kill", int(made.calls * self.scenario.killed)))
        shutil.copytree(self.start, self.whole)
        done = dpkd(self.scenario.command, self.whole)
        assert done.kind == "ok", done.text
        self.calls, self.left = done.calls, self.result(self.whole)

    def result(self, folder: Path) -> dict[str, str]:
        found = fingerprint(folder / self.scenario.result) if (folder / self.scenario.result).exists() else {}
        return {name: value for name, value in found.items() if not name.startswith("cache/")}

    def case(self, fault: Fault) -> dict[str, Any]:
        """One fault, the second call, and what became of it."""
        folder = self.output / f"{self.scenario.name}-case"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(self.start, folder)
        first = dpkd(self.scenario.command, folder, fault)
        second = self.second(folder, first)
        left = self.result(folder)
        row = {"first": first.kind, "second": second.kind, "outcome": self.outcome(first, second, left)}
        if row["outcome"] not in ("identical", "refused"):
            row["text"] = (first.text + "\n--\n" + second.text)[-3000:]
            names = sorted(name for name in {*left, *self.left} if left.get(name) != self.left.get(name))
            row["differing"] = names[:8]
        elif row["outcome"] == "refused":
            row["text"] = second.text[-400:]
        return row

    def second(self, folder: Path, first: SweepOutcome) -> SweepOutcome:
        again = dpkd(self.scenario.again, folder)
        if again.kind == "refused" and "is not a run folder" in again.text:
            again = dpkd(self.scenario.command, folder)
        if again.kind == "refused" and "is finished" in again.text:
            again = SweepOutcome(0, again.text, again.calls)
        return again

    def outcome(self, first: SweepOutcome, second: SweepOutcome, left: dict[str, str]) -> str:
        for kind in ("hang", "traceback"):
            if kind in (first.kind, second.kind):
                return kind
        if second.kind == "refused":
            return "refused"
        return "identical" if left == self.left else "different"


def faults(calls: int, every: int) -> Iterator[Fault]:
    """Each k-th call killed, and without space: for good, torn, or once."""
    for at in range(0, calls, every):
        for kind in ("kill", "full", "torn", "full-once"):
            yield Fault(kind, at)


def damage(soak: Soak, generator: random.Random) -> tuple[str, dict[str, Any]]:
    """Flip, cut, empty or lose one file that the whole command left; then call again."""
    folder = soak.output / f"{soak.scenario.name}-case"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(soak.whole, folder)
    files = sorted(p for p in (folder / soak.scenario.result).rglob("*") if p.is_file() and "cache" not in p.parts)
    file, how = generator.choice(files), generator.choice(("flip", "cut", "empty", "lose"))
    content = bytearray(file.read_bytes())
    if how == "flip" and content:
        content[generator.randrange(len(content))] ^= 1 << generator.randrange(8)
    if how == "lose":
        file.unlink()
    else:
        file.write_bytes({"cut": content[: len(content) // 2], "empty": b""}.get(how, content))
    second = soak.second(folder, SweepOutcome(0, "", 0))
    row: dict[str, Any] = {"second": second.kind, "file": str(file.relative_to(folder)), "how": how}
    row["outcome"] = second.kind if second.kind in ("hang", "traceback", "refused") else "went on"
    row["text"] = second.text[-1500:] if second.kind == "traceback" else ""
    return f"{row['file']} {how}", row


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--minutes", type=float, default=30.0, help="stop after so long; a second call goes on")
    options.add_argument("--output", type=Path, default=Path("soak"), help="folder of the cases")
    options.add_argument("--every", type=int, default=1, help="a fault at every k-th call of the file system")
    options.add_argument("--only", default="", help="comma-separated names of scenarios, or bad-input")
    options.add_argument("--cases", type=int, default=10_000, help="of bad input")
    given = options.parse_args()
    output: Path = given.output.resolve()
    write_toy(output / "toy")
    log, until = JsonLog(output / "cases.jsonl", case=str), time.monotonic() + 60 * given.minutes
    known = {row["case"] for row in log.rows()}
    for scenario in SCENARIOS:
        if given.only and scenario.name not in given.only.split(","):
            continue
        soak = Soak(output, scenario)
        soak.undisturbed()
        for fault in faults(soak.calls, given.every):
            name = f"{scenario.name} {fault.kind} {fault.at}"
            if time.monotonic() < until and name not in known:
                log.append({"case": name, "scenario": scenario.name, "fault": fault.kind, **soak.case(fault)})
        generator = random.Random(0)
        for number in range(40):
            found, row = damage(soak, generator)
            name = f"{scenario.name} damage {number}"
            if time.monotonic() < until and name not in known:
                log.append({"case": name, "scenario": scenario.name, "fault": "damage", "what": found, **row})
    if not given.only or "bad-input" in given.only.split(","):
        feed(output / "bad-input", given.cases, log, known, until)
    return report(log.rows())


def feed(folder: Path, count: int, log: JsonLog, known: set[str], until: float) -> None:
    """Generated cases of bad input, in this process."""
    world = bad_input.World.make(folder)
    for family, number in bad_input.cases(count):
        name = f"bad-input {family} {number}"
        if time.monotonic() < until and name not in known:
            row = bad_input.run(family, number, world)
            log.append({"case": name, "scenario": "bad-input", "fault": family, **row})


def report(rows: list[dict[str, Any]]) -> int:
    """Print the counts; 1 when there is a case of a kind that must not be."""
    counts = Counter((row["scenario"], row["fault"], row["outcome"]) for row in rows)
    for (scenario, fault, outcome), count in sorted(counts.items()):
        print(f"{scenario:10} {fault:10} {outcome:10} {count:6,}")
    totals = Counter(row["outcome"] for row in rows)
    print("total", dict(totals))
    return int(any(totals[outcome] for outcome in ("different", *bad_input.BAD)))


if __name__ == "__main__":
    sys.exit(main())
