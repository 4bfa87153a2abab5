"""Follow docs/write-a-loss.md to the letter in a fresh virtual environment, and print the time of each step.

    python benchmarks/ten_minutes.py                          # all of it from the package index
    python benchmarks/ten_minutes.py --system-site-packages   # dpkd and its dependencies from this environment

Every command of the tutorial's `bash` blocks is run, every `diff` block is applied to its file, in order. For gpt2-xl,
gpt2 and the data, the small models and sentences of the shared folder stand in (DPKD_SHARED, default ../shared); what
publishes, and the demo, which is a ten-minute run of its own, are left out and named.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

ROOT = Path(__file__).parents[1]
TUTORIAL = ROOT / "docs/write-a-loss.md"
SHARED = Path(os.environ.get("DPKD_SHARED", ROOT.parent / "shared"))
STORIES = SHARED / "models" / "stories260K"
LEFT_OUT = {  # first words of a command → why it is not run
    "dpkd demo": "ten minutes of training by itself: make demo",
    "python -m pip install git+": "nothing is published",
    "python -m pip install build": "nothing is published",
    "python -m build": "nothing is published",
    "python -m twine": "nothing is published",
}
SMALL = ("data.template=none", "train.batch_size=16", "train.lr=3e-3", "text.sampling.max_new_tokens=32")


def steps(text: str) -> Iterator[tuple[str, str]]:
    """The tutorial's (`bash`, command) and (`diff`, block), in order."""
    for language, block in re.findall(r"^```(bash|diff)\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE):
        if language == "diff":
            yield language, block
        else:
            yield from ((language, line.split("  #")[0].strip()) for line in block.splitlines())


def apply(block: str, folder: Path) -> Path:
    """Put the + lines of a diff block where its - lines are, in the one file that has them; returns it."""
    old = "".join(f"{line[1:]}\n" for line in block.splitlines() if line.startswith("-"))
    new = "".join(f"{line[1:]}\n" for line in block.splitlines() if line.startswith("+"))
    found = [path for path in sorted(folder.glob("*.py")) if path.read_text(encoding="utf-8").count(old) == 1]
    if len(found) != 1:
        raise SystemExit(f"an edit of the tutorial fits {len(found)} files of {folder}, expected one:\n{block}")
    text = found[0].read_text(encoding="utf-8")
    found[0].write_text(text.replace(old, new), encoding="utf-8")
    return found[0]


def write_data(folder: Path) -> None:
    """Beginnings of stories and how they go on: to train on, and held out."""
    rng = random.Random(0)
    names, things = ["Lily", "Tom", "Ben", "Mia"], ["dog", "cat", "ball", "tree", "bird", "hat"]
    for file, count in (("train.jsonl", 160), ("eval.jsonl", 20)):
        rows = []
        for _ in range(count):
            name, thing, other = rng.choice(names), *rng.sample(things, 2)
            rest = f" saw a big {thing}. It was with a {other}. They played all day and were happy."
            rows.append({"prompt": f"Once upon a time, {name}", "response": rest})
        (folder / file).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def stand_in(words: list[str], count: int) -> list[str]:
    """The command with small models, and with so many training steps."""
    if words[:2] == ["dpkd", "eval"]:
        return [*words, "--limit", "20", "--max-new-tokens", "32", "--seeds", "10"]
    if words[:2] != ["dpkd", "train"]:
        return words
    words = [str(STORIES) if word == "gpt2-xl" else word for word in words]
    at = words.index("--student")
    words[at : at + 2] = ["--set", "student.init=layers", "--set", "student.layers=2"]
    if "--data" not in words:
        words += ["--data", "train.jsonl"]
    return [*words, *(part for value in (*SMALL, f"train.steps={count}") for part in ("--set", value))]


def run(words: list[str], folder: Path, environment: dict[str, str]) -> float:
    """Seconds of a command. Raises SystemExit with its output when it fails."""
    began = time.monotonic()
    done = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{shlex.join(words)} failed:\n{done.stdout}\n{done.stderr}")
    return time.monotonic() - began


def install(folder: Path, site: bool) -> tuple[dict[str, str], float]:
    """A fresh environment with dpkd in it, and the seconds that it took."""
    began = time.monotonic()
    run([sys.executable, "-m", "venv", str(folder)], ROOT, dict(os.environ))
    python = str(folder / "bin/python")
    if site:  # --system-site-packages would show the base interpreter's packages, not those of this environment
        here = subprocess.check_output([sys.executable, "-c", "import site; print(*site.getsitepackages())"], text=True)
        code = f"import sysconfig; open(sysconfig.get_path('purelib') + '/shown.pth', 'w').write({_addsite(here)!r})"
        run([python, "-c", code], ROOT, dict(os.environ))
    else:
        run([python, "-m", "pip", "install", "-q", "-c", "constraints.txt", "."], ROOT, dict(os.environ))
    scripts = folder / "bin"
    if site:
        (scripts / "dpkd").write_text(f"#!{python}\nfrom dpkd.cli.main import main\n\nmain()\n", encoding="utf-8")
        (scripts / "dpkd").chmod(0o755)
    environment = os.environ | {"PATH": f"{scripts}{os.pathsep}{os.environ['PATH']}", "DPKD_CACHE": str(folder / "c")}
    return environment, time.monotonic() - began


def _addsite(folders: str) -> str:
    """A line of a .pth file that shows the packages of other folders, and what those show in turn."""
    return "import site; " + "; ".join(f"site.addsitedir({folder!r})" for folder in folders.split()) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--system-site-packages", action="store_true")
    parser.add_argument("--steps", type=int, default=200, help="training steps of each run")
    given = parser.parse_args()
    if not STORIES.is_dir():
        raise SystemExit(f"no models in {STORIES}: set DPKD_SHARED")
    total = 0.0
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work)
        environment, seconds = install(folder / "venv", given.system_site_packages)
        shown = " (packages shown from this one)" if given.system_site_packages else ""
        first = ("", f"a fresh environment with dpkd{shown}", seconds)
        for kind, step, spent in chain([first], follow(folder, environment, given.steps)):
            total += spent
            print(f"{spent:7.1f} s  {kind:5}{step}", flush=True)
    print(f"{total:7.1f} s  in all; ten minutes are 600 s")


def follow(folder: Path, environment: dict[str, str], count: int) -> Iterator[tuple[str, str, float]]:
    """What was done at each step of the tutorial, and its seconds."""
    for kind, step in steps(TUTORIAL.read_text(encoding="utf-8")):
        why = next((why for start, why in LEFT_OUT.items() if step.startswith(start)), "")
        if why:
            yield "-", f"{step}: left out, {why}", 0.0
        elif kind == "diff":
            yield "edit", apply(step, folder).name, 0.0
        elif step.startswith("cd "):
            folder = folder / step.removeprefix("cd ")
            write_data(folder)
        else:
            yield "$", step, run(stand_in(shlex.split(step), count), folder, environment)


if __name__ == "__main__":
    main()
