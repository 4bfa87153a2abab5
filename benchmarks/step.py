"""One optimiser step of many objectives: time as ratios in one process, memory in a process per variant.

GPT-2-shaped student 4 x 256 and teacher 8 x 512, vocabulary 50,257, a batch of 8 rows of up to 256 tokens: prompts of
64 to 128 tokens, responses of 16 to 128. A step is the student's forward and backward, the teacher's forward, and the
loss. `released shape` is what the published DPKD script does: all rows padded to 256, logits of every position of both
models, several copies of [B, T, V]. It is written here from its description.

    python benchmarks/step.py [--repeats 5] [--only NAME ...]
"""

from __future__ import annotations

import argparse
import random
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, GPT2Config

from dpkd.api import Family, Text
from dpkd.data.batches import TokenSequence, collate
from dpkd.engine.distiller import Distiller
from dpkd.engine.step import Stepper
from dpkd.engine.work import Cutter, Stream, Term, Unit
from dpkd.host import load_host
from dpkd.models.head import hidden_rows
from dpkd.teachers.live import LiveTeacher
from dpkd.text.responses import Response

VOCABULARY, ROWS, LENGTH, EOS = 50257, 8, 256, 50256
Step = Callable[[], None]


def models() -> tuple[torch.nn.Module, torch.nn.Module]:
    torch.manual_seed(0)
    shapes = ((4, 256, 4), (8, 512, 8))
    configs = [
        GPT2Config(n_layer=layers, n_embd=width, n_head=heads, n_positions=512) for layers, width, heads in shapes
    ]
    student, teacher = (AutoModelForCausalLM.from_config(config) for config in configs)
    return student.train(), teacher.eval().requires_grad_(False)


def sequences(count: int) -> list[TokenSequence]:
    rng = random.Random(0)
    found = []
    for _ in range(count):
        prompt = [rng.randrange(EOS) for _ in range(rng.randint(64, 128))]
        found.append(TokenSequence(prompt, [rng.randrange(EOS) for _ in range(rng.randint(15, 127))] + [EOS]))
    return found


class _NoUpdate:
    """Stands in for the optimiser: the same for every variant, so it is left out."""

    def __init__(self, module: torch.nn.Module) -> None:
        self._module, self.param_groups = module, []

    def zero_grad(self, set_to_none: bool = True) -> None:
        self._module.zero_grad(set_to_none=True)

    def step(self) -> None:
        pass


class _Known:
    """A teacher whose log-probs of the responses are in a store: read once, the same at every step."""

    def __init__(self, teacher: LiveTeacher) -> None:
        self._teacher, self._kept = teacher, {}

    def logps(self, batch, chunk):
        key = (len(batch.targets), int(batch.targets.sum()))
        if key not in self._kept:
            self._kept[key] = self._teacher.logps(batch, chunk)
        return self._kept[key]


def ours(name: str, stored: bool = False, **settings) -> Step:
    """Our engine's own step: streams, micro-batches, chunked head, one denominator."""
    from accelerate import Accelerator

    student, teacher = models()
    accelerator = Accelerator(cpu=True)
    spec = load_host().get(name).spec
    config = spec.config(**settings)
    distiller = Distiller(student, {"main": spec.loss(config)}, vocabulary=VOCABULARY, chunk_mib=32.0)
    live = LiveTeacher(teacher, VOCABULARY, torch.device("cpu"))
    pairs = spec.family is Family.PAIR
    rows = sequences(2 * ROWS if pairs else ROWS)
    if pairs:
        rows = [TokenSequence(rows[i // 2].prompt_ids, row.response_ids) for i, row in enumerate(rows)]
    groups = [rows[i : i + 2] for i in range(0, len(rows), 2)] if pairs else [[row] for row in rows]
    units = [Unit(tuple(g), tuple(Response(tuple(s.response_ids), Text.DATASET) for s in g)) for g in groups]
    tokens = sum(len(s.response_ids) for s in rows)
    term = Term("main", spec.signals(config), 1.0, len(units) if pairs else tokens)
    stream = Stream("main", units, [term], pairs)
    source = _Known(live) if stored else live
    stepper = Stepper(accelerator, distiller, _NoUpdate(distiller), source, None, Cutter(2 * ROWS, EOS), 1.0)
    return lambda: stepper([stream], lr=0.0, measure=False)


def padded(pairs: bool = False) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Input ids, attention mask and mask of predicted response tokens, padded to LENGTH."""
    rows = sequences(2 * ROWS if pairs else ROWS)
    if pairs:
        rows = [TokenSequence(rows[i // 2].prompt_ids, row.response_ids) for i, row in enumerate(rows)]
    ids = torch.full((len(rows), LENGTH), EOS)
    mask, response = torch.zeros_like(ids), torch.zeros_like(ids)
    for i, (prompt, answer) in enumerate(rows):
        whole = [*prompt, *answer][:LENGTH]
        ids[i, : len(whole)] = torch.tensor(whole)
        mask[i, : len(whole)] = 1
        response[i, len(prompt) - 1 : len(whole) - 1] = 1
    return ids, mask, response


def released(kind: str) -> Step:
    student, teacher = models()
    ids, mask, response = padded()

    def step() -> None:
        student.zero_grad()
        q = student(ids, attention_mask=mask).logits
        with torch.no_grad():
            p = teacher(ids, attention_mask=mask).logits
        if kind == "kl":
            probs = F.softmax(p, -1, dtype=torch.float32)
            logs = F.log_softmax(q, -1, dtype=torch.float32)
            product = torch.masked_fill(probs * logs, torch.isinf(q), 0)
            loss = -(product.sum(-1) * response).sum() / response.sum()
        else:
            log_q, log_p = F.log_softmax(q.bfloat16(), -1), F.log_softmax(p.bfloat16(), -1)
            a, b = log_p.argmax(-1, keepdim=True), log_q.argmax(-1, keepdim=True)
            gap = (log_q.gather(-1, a) - log_q.gather(-1, b)) - (log_p.gather(-1, a) - log_p.gather(-1, b))
            loss = -(F.logsigmoid(0.1 * gap.float()).squeeze(-1) * response).sum() / response.sum()
        loss.backward()

    return step


def full_pairs() -> Step:
    student, teacher = models()
    ids, mask, response = padded(pairs=True)
    targets = ids.roll(-1, 1)

    def summed(model: torch.nn.Module) -> torch.Tensor:
        logs = F.log_softmax(model(ids, attention_mask=mask).logits.float(), -1)
        return (logs.gather(-1, targets.unsqueeze(-1)).squeeze(-1) * response).sum(1)

    def step() -> None:
        student.zero_grad()
        with torch.no_grad():
            reference = summed(teacher)
        ratio = summed(student) - reference
        (-F.logsigmoid(0.1 * (ratio[0::2] - ratio[1::2])).mean()).backward()

    return step


def trl(beta: float) -> Step:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from trl.experimental.gkd import GKDTrainer
    student, teacher = models()
    ids, mask, response = padded()
    labels = torch.where(response.bool(), ids, -100)

    def step() -> None:
        student.zero_grad()
        q = student(ids, attention_mask=mask).logits
        with torch.no_grad():
            p = teacher(ids, attention_mask=mask).logits
        GKDTrainer.generalized_jsd_loss(q, p, labels=labels, beta=beta).backward()

    return step


def backbones() -> Step:
    """No head and no loss: the floor."""
    student, teacher = models()
    batch = collate(sequences(ROWS), pad_id=EOS)

    def step() -> None:
        student.zero_grad()
        with torch.no_grad():
            hidden_rows(teacher, batch)
        hidden_rows(student, batch).sum().backward()

    return step


VARIANTS: dict[str, Callable[[], Step]] = {
    "released shape, KL": lambda: released("kl"),
    "released shape, DPKD token term": lambda: released("dpkd"),
    "TRL generalized_jsd_loss, JSD": lambda: trl(0.5),
    "TRL generalized_jsd_loss, forward KL": lambda: trl(0.0),
    "pairs, full logits": full_pairs,
    "backbones alone": backbones,
    "dpkd: fkl": lambda: ours("fkl"),
    "dpkd: rkl": lambda: ours("rkl"),
    "dpkd: jsd": lambda: ours("jsd"),
    "dpkd: akl": lambda: ours("akl"),
    "dpkd: dpkd-token": lambda: ours("dpkd-token"),
    "dpkd: dpkd pairs": lambda: ours("dpkd"),
    "dpkd: dpkd pairs, teacher from a store": lambda: ours("dpkd", stored=True),
}


def times(names: list[str], repeats: int) -> dict[str, float]:
    """Median seconds; the variants take turns, so that a slow moment of the machine meets all of them."""
    steps = {name: VARIANTS[name]() for name in names}
    for step in steps.values():
        step()
    taken: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(repeats):
        for name, step in steps.items():
            began = time.perf_counter()
            step()
            taken[name].append(time.perf_counter() - began)
    return {name: statistics.median(values) for name, values in taken.items()}


def growth_mib(name: str) -> float:
    """Peak memory of a process above what it had with the models loaded, over two steps."""
    here = str(Path(__file__).parent)
    code = f"import sys; sys.path.insert(0, {here!r}); import step; print(step.measure_growth({name!r}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])


def measure_growth(name: str) -> float:
    step = VARIANTS[name]()
    before = _peak_mib()
    for _ in range(2):
        step()
    return _peak_mib() - before


def _peak_mib() -> float:
    """Peak of this process since it was started (ru_maxrss also counts the process that started it)."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 2**10


def table(names: list[str], repeats: int) -> str:
    taken = times(names, repeats)
    base = taken.get("released shape, KL", max(taken.values()))
    lines = ["| variant | time, released shape = 1 | peak memory growth, MiB |", "|---|---|---|"]
    lines += [f"| {name} | {taken[name] / base:.2f} | {growth_mib(name):,.0f} |" for name in names]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--only", action="append", choices=list(VARIANTS))
    arguments = parser.parse_args()
    print(table(arguments.only or list(VARIANTS), arguments.repeats))


if __name__ == "__main__":
    main()
