"""`make soak`: kills, faults and damage over every command that writes; what became of each case is counted.

    python tests/reliability/soak.py --minutes 30 --output soak

A case runs a command under a fault, then again without one, and compares what is left with what an undisturbed command
leaves. The commands fork at each of their calls (faults.Injector); what several faults leave behind alike, to the byte,
is met by one second command for all of them. Outcomes: identical; refused (a sentence, exit 1 or 2); kept (of a damaged
file that nothing reads); and what must not be: different, traceback, hang. Then come generated cases of bad input
(bad_input.py).

The cases of all commands are mixed evenly, so that whatever time there is covers all of them. Finished cases are in
OUTPUT/cases.jsonl: a second call goes on with the rest. A folder in memory (/dev/shm) is the fastest.
"""

from __future__ import annotations

import argparse
import os
import random
import re
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import bad_input
from faults import Fault, SweepOutcome, dpkd
from toy_commands import CACHE, COMPARE, EVAL, LIMITS, REPORT, SAMPLE, SWEEP, TRAIN, fingerprint, write_toy

from dpkd.io import JsonLog

RESUME = ["train", "--resume", "run"]
EVAL_RUN = ["eval", "--model", "run", "--data", "../toy/data.jsonl", "--seeds", "1", "--max-new-tokens", "2"]
EXTEND = [*RESUME, "--set", "train.steps=6"]
FROM_STORE = [
    *("train", "--loss", "kd", "--student", "../toy/model", "--data", "../toy/data.jsonl", "--output", "run"),
    *("--set", "teacher.store=store", "--set", "train.steps=2", "--set", "train.device=cpu", *LIMITS),
]


@dataclass(frozen=True)
class Scenario:
    """A command, and what is called after a fault; `prepare` makes the folder that it works on."""

    name: str
    command: Sequence[str]
    again: Sequence[str]
    prepare: Sequence[Sequence[str]] = ()
    killed: float | None = None  # the last of these is killed after this share of its calls
    reader: Sequence[str] | None = None  # what is called when a file that the command left is damaged


SCENARIOS = (
    Scenario("train", TRAIN, RESUME, reader=EXTEND),
    Scenario("resume", RESUME, RESUME, prepare=[TRAIN], killed=0.6, reader=REPORT),
    Scenario("extend", EXTEND, EXTEND, prepare=[TRAIN], reader=EVAL_RUN),
    Scenario("eval", EVAL, EVAL, reader=COMPARE),
    Scenario("sample", SAMPLE, SAMPLE, reader=SAMPLE),
    Scenario("cache", CACHE, CACHE, reader=FROM_STORE),
    Scenario("sweep", SWEEP, SWEEP, reader=SWEEP),
    Scenario("report", REPORT, REPORT, prepare=[TRAIN], reader=REPORT),
    Scenario("compare", COMPARE, COMPARE, prepare=[EVAL], reader=COMPARE),
)
DAMAGED = 30  # files of each scenario
DISKS = 10  # sizes of the disk of each scenario


class Soak:
    """The cases of a scenario, each in a folder of its own that goes when it is done."""

    def __init__(self, output: Path, scenario: Scenario) -> None:
        self.output, self.scenario = output, scenario
        self.start = output / f"{scenario.name}-start"  # what `prepare` makes
        self.whole = output / f"{scenario.name}-whole"  # what the undisturbed command leaves
        self.read = output / f"{scenario.name}-read"  # and the reader after it
        self.folder = output / f"{scenario.name}-case"
        self.branches = output / f"{scenario.name}-branches"  # and the faults at each of its calls
        self.seconds: dict[str, dict[str, Any]] = {}  # what the second command made of each state

    def prepare(self, kinds: Sequence[str]) -> list[tuple[str, Fault | int]]:
        """All cases of these kinds; the commands run without a fault, and with one at each call, unless they have."""
        if not self.read.with_suffix(".done").exists():
            self._undisturbed()
            self.read.with_suffix(".done").touch()
        if "fault" in kinds and not (self.branches / "complete").exists():
            self._branch()
            (self.branches / "complete").touch()
        self.first = {(row["kind"], row["at"]): row for row in JsonLog(self.branches / "first.jsonl").rows()}
        self.left, self.after = _result(self.whole), _result(self.read)
        return [case for case in self.cases() if (case[0] if isinstance(case[1], int) else "fault") in kinds]

    def _undisturbed(self) -> None:
        """For what the commands leave."""
        for folder in (self.start, self.whole, self.read):
            shutil.rmtree(folder, ignore_errors=True)
        self.start.mkdir(parents=True)
        for command in self.scenario.prepare:
            made = _ok(dpkd(command, self.start))
        if self.scenario.killed is not None:
            shutil.rmtree(self.start)
            dpkd(self.scenario.prepare[-1], self.start, Fault("kill", int(len(made.calls) * self.scenario.killed)))
        shutil.copytree(self.start, self.whole)
        _ok(dpkd(self.scenario.command, self.whole))
        shutil.copytree(self.whole, self.read)
        if self.scenario.reader is not None:
            _ok(dpkd(self.scenario.reader, self.read))

    def _branch(self) -> None:
        """Run the command once, with a fork at each call for each fault."""
        for folder in (self.branches, self.folder):
            _away(folder)
        shutil.copytree(self.start, self.folder)
        self.branches.mkdir()
        (self.branches / "toy").symlink_to(self.output / "toy")  # a fork works one folder deeper
        _ok(dpkd(self.scenario.command, self.folder, branches=self.branches))

    def cases(self) -> list[tuple[str, Fault | int]]:
        """All cases in a random order that is always the same, as kind and fault, or kind and number."""
        found: list[tuple[str, Fault | int]] = [(kind, Fault(kind, at)) for kind, at in self.first]
        found += [("damage", number) for number in range(DAMAGED)]
        found += [("disk", number) for number in range(DISKS if _can_mount() else 0)]
        random.Random(self.scenario.name).shuffle(found)
        return found

    def case(self, what: Fault | int, kind: str) -> dict[str, Any]:
        """One case, and what became of it."""
        _away(self.folder)
        if isinstance(what, Fault):
            return self._forked(what)
        return self._damaged(what) if kind == "damage" else self._small_disk(what)

    def _forked(self, fault: Fault) -> dict[str, Any]:
        """What the second command makes of what the fork left; other than well, all of it is done once more."""
        found = self.first[fault.kind, fault.at]
        state, first = found["state"], SweepOutcome(found["code"], found["text"], [])
        if state not in self.seconds:
            shutil.copytree(self.branches / state, self.folder, symlinks=True)
            self.seconds[state] = self._row(first, self._second())
        row = self.seconds[state] | {"first": first.kind, "state": state, "call": found["call"]}
        if row["outcome"] in GOOD and first.kind in ("ok", "killed", "refused"):
            return row
        _away(self.folder)
        shutil.copytree(self.start, self.folder)
        return self._faulty(fault) | {"state": state, "call": found["call"], "repeated": True}

    def _faulty(self, fault: Fault) -> dict[str, Any]:
        first = dpkd(self.scenario.command, self.folder, fault)
        return self._row(first, self._second())

    def _small_disk(self, number: int) -> dict[str, Any]:
        """A file system that is full before the command is done, as it is to all libraries; then it has more space."""
        start, whole = _size(self.start), _size(self.whole)
        space = start + int((whole - start) * 1.2 * (number + 1) / DISKS)
        self.folder.mkdir()
        with mounted(self.folder, space) as grow:
            shutil.copytree(self.start, self.folder, dirs_exist_ok=True)
            first = dpkd(self.scenario.command, self.folder)
            grow(1 << 28)
            return self._row(first, self._second()) | {"space": space}

    def _second(self) -> SweepOutcome:
        again = dpkd(self.scenario.again, self.folder)
        if again.kind == "refused" and "is not a run folder" in again.text:
            again = dpkd(self.scenario.command, self.folder)
        if again.kind == "refused" and "is finished" in again.text:
            again = SweepOutcome(0, again.text, again.calls)
        return again

    def _row(self, first: SweepOutcome, second: SweepOutcome) -> dict[str, Any]:
        outcome, names = self._outcome(first, second)
        row = {"first": first.kind, "second": second.kind, "outcome": outcome}
        if outcome != "identical":
            row |= {"text": (first.text[-2000:] + "\n--\n" + second.text[-2000:]), "differing": names[:8]}
        return row

    def _outcome(self, first: SweepOutcome, second: SweepOutcome) -> tuple[str, list[str]]:
        for kind in ("hang", "traceback"):
            if kind in (first.kind, second.kind):
                return kind, []
        if second.kind != "ok":
            return second.kind, []
        names = _differing(_result(self.folder), self.left)
        return ("different" if names else "identical"), names

    def _damaged(self, number: int) -> dict[str, Any]:
        """Flip, cut, empty or lose one file that the whole command left; then call what reads it."""
        generator = random.Random(f"{self.scenario.name} {number}")
        shutil.copytree(self.whole, self.folder)
        # A model card is for people, who may edit it: no command reads it.
        left = (p for p in self.folder.rglob("*") if p.is_file() and "cache" not in p.parts and p.name != "README.md")
        files = sorted(left)
        file, how = generator.choice(files), generator.choice(("flip", "cut", "empty", "lose"))
        _damage(file, how, generator)
        assert self.scenario.reader is not None
        second = dpkd(self.scenario.reader, self.folder)
        if second.kind == "refused" and "is finished" in second.text:
            second = SweepOutcome(0, second.text, second.calls)
        name = str(file.relative_to(self.folder))
        row: dict[str, Any] = {"second": second.kind, "file": name, "how": how, "outcome": second.kind}
        if second.kind == "ok":
            names = _differing(_result(self.folder), self.after)
            row["outcome"] = {0: "identical"}.get(len(names), "kept" if names == [name] else "different")
            row["differing"] = names[:8]
        return row | ({} if row["outcome"] == "identical" else {"text": second.text[-2000:]})


def _ok(done: SweepOutcome) -> SweepOutcome:
    assert done.kind == "ok", done.text
    return done


def _result(folder: Path) -> dict[str, str]:
    """What is left, without stores, which may be filled further, and what a sweep says of its runs.

    Which number a shard has does not count, nor does a shard that no list names: nothing reads it.
    """
    found = fingerprint(folder)
    left = {name: value for name, value in found.items() if not (name.startswith("cache/") or name.endswith(".log"))}
    for name in [name for name in left if re.search(r"/shard-\d+\.\w+$", name)]:
        value, stem = left.pop(name), name.rpartition(".")[0]
        if f"{stem}.json" in found:
            left[re.sub(r"\d+\.(\w+)$", rf"{value}.\1", name)] = value
    return left


def _differing(found: dict[str, str], wanted: dict[str, str]) -> list[str]:
    return sorted(name for name in {*found, *wanted} if found.get(name) != wanted.get(name))


def _damage(file: Path, how: str, generator: random.Random) -> None:
    content = bytearray(file.read_bytes())
    if how == "lose":
        file.unlink()
        return
    if how == "flip" and content:
        content[generator.randrange(len(content))] ^= 1 << generator.randrange(8)
    damaged = {"cut": content[: len(content) // 2], "empty": b""}.get(how, content)
    file.unlink()  # hard links of it stay whole
    file.write_bytes(damaged)


def _size(folder: Path) -> int:
    """Bytes of a folder on a file system in memory, which has pages."""
    return sum(-(-path.stat().st_size // 4096) * 4096 + 4096 for path in [folder, *folder.rglob("*")])


def _can_mount() -> bool:
    return sys.platform == "linux" and os.geteuid() == 0 and shutil.which("mount") is not None


@contextmanager
def mounted(folder: Path, size: int) -> Iterator[Any]:
    """A file system of so many bytes at the folder, and a function that changes its size."""
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], check=True)
    try:
        yield lambda more: subprocess.run(["mount", "-o", f"remount,size={more}", folder], check=True)
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


def _away(folder: Path) -> None:
    while folder.is_mount():  # an interrupted call left it
        subprocess.run(["umount", "--lazy", folder], check=True)
    shutil.rmtree(folder, ignore_errors=True)


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--minutes", type=float, default=30.0, help="stop after so long; a second call goes on")
    options.add_argument("--output", type=Path, default=Path("soak"), help="folder of the cases")
    options.add_argument("--kinds", default="fault,disk,damage", help="of the cases of scenarios, comma-separated")
    options.add_argument("--only", default="", help="comma-separated names of scenarios, or bad-input")
    options.add_argument("--cases", type=int, default=10_000, help="of bad input")
    options.add_argument("--seed", type=int, default=0, help="of bad input; another one makes other cases")
    options.add_argument("--table", action="store_true", help="print the table of what is done, and run nothing")
    given = options.parse_args()
    output: Path = given.output.resolve()
    log, until = JsonLog(output / "cases.jsonl", case=str), time.monotonic() + 60 * given.minutes
    if not given.table:
        only = given.only.split(",") if given.only else [*(scenario.name for scenario in SCENARIOS), "bad-input"]
        soak(output, log, until, only, given.kinds.split(","), given.cases, given.seed)
    return report(log.rows())


def soak(output: Path, log: JsonLog, until: float, only: list[str], kinds: list[str], count: int, seed: int) -> None:
    """Run the cases that are not in the log yet, until the time is over."""
    if not (output / "toy").exists():
        write_toy(output / "toy")
    rows = log.rows()
    known = {row["case"] for row in rows}
    todo: list[tuple[float, str, Any]] = []
    for scenario in SCENARIOS:
        if scenario.name in only:
            one = Soak(output, scenario)
            cases = one.prepare(kinds)
            one.seconds = {row["state"]: row for row in rows if row["scenario"] == scenario.name and "state" in row}
            todo += [(at / len(cases), scenario.name, (one, *case)) for at, case in enumerate(cases)]
    if "bad-input" in only:
        world = bad_input.World.make(output / "bad-input")
        inputs = list(bad_input.cases(count))
        todo += [(1 + at, "bad-input", (world, *case)) for at, case in enumerate(inputs)]  # after the others
    for _, scenario_name, (where, kind, what) in sorted(todo, key=lambda case: case[:2]):
        name = f"{scenario_name} {kind} {what.at if isinstance(what, Fault) else what}"
        name += f" seed {seed}" * (scenario_name == "bad-input" and seed != 0)
        if name in known:
            continue
        if time.monotonic() > until:
            break
        row = where.case(what, kind) if isinstance(where, Soak) else bad_input.run(kind, what, where, seed)
        log.append({**row, "case": name, "scenario": scenario_name, "fault": kind})


KINDS = {"kill": "killed", "full": "faults", "full-once": "faults", "torn": "faults", "disk": "full disks"}
GOOD = ("identical", "kept", "refused", "accepted")
NEVER = ("different", "traceback", "hang")


def report(rows: list[dict[str, Any]]) -> int:
    """Print the counts as a table in Markdown; 1 when there is a case of a kind that must not be."""
    counts: dict[tuple[str, str], Counter[str]] = {}
    for row in rows:
        is_input = row["scenario"] == "bad-input"
        what = "bad input" if is_input else KINDS.get(row["fault"], "damaged files")
        for place in (row["fault"] if is_input else row["scenario"], "all"):
            counts.setdefault((what, place), Counter())[row["outcome"]] += 1
    others = sorted({outcome for count in counts.values() for outcome in count} - {*GOOD, *NEVER})
    columns = [*GOOD, *NEVER, *others]
    print(f"| | command or input | cases | {' | '.join(columns)} |")
    print(f"|---|---|{'---:|' * (1 + len(columns))}")
    for (what, place), count in sorted(counts.items(), key=lambda item: (item[0][0], item[0][1] == "all", item[0][1])):
        numbers = [sum(count.values()), *(count[outcome] for outcome in columns)]
        print(f"| {what} | {place} | {' | '.join(f'{number:,}' for number in numbers)} |")
    return int(any(count[outcome] for count in counts.values() for outcome in (*NEVER, *others)))


if __name__ == "__main__":
    sys.exit(main())
