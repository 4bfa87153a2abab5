"""One step of many objectives: time as ratios in one process, memory in a process per variant.

GPT-2-shaped student 4 x 256 and teacher 8 x 512, vocabulary 50,257, a batch of 8 rows of up to 256 tokens: prompts of
64 to 128 tokens, responses of 16 to 128. A step is the student's forward and backward, the teacher's forward, and the
loss; no update, which is the same for all. Pairs have twice the rows, and so has the floor of their memory.

    python benchmarks/step.py [--repeats 5] [--only NAME ...] [--tiny]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import peers
import torch
from harness import call_in_process, markdown, peak_mib, resident_mib, seconds_of
from ours import engine_step
from shapes import GPT2_PAIR, TINY_PAIR, Shape, new_model, sequences

from dpkd.data.batches import TokenSequence

__all__ = ["VARIANTS", "table"]

Step = Callable[[], Any]
BASE = "released shape, KL"
FLOOR = "backbones alone (floor)"
# The floor of memory is that of the rows that a variant has: of a batch after another one, that of the larger.
FLOOR_OF_PAIRS = "backbones alone, pairs (floor)"
FLOOR_OF_CORPUS = "backbones alone, corpus (floor)"


@dataclass(frozen=True)
class Size:
    """Of models and batch."""

    student: Shape = GPT2_PAIR[0]
    teacher: Shape = GPT2_PAIR[1]
    rows: int = 8
    length: int = 256
    prompt: tuple[int, int] = (64, 128)
    response: tuple[int, int] = (16, 128)

    @property
    def eos(self) -> int:
        return self.student.vocabulary - 1

    @cache  # noqa: B019 (one pair for all variants: every step drops the gradients of the one before)
    def models(self) -> peers.Models:
        student, teacher = new_model(self.student), new_model(self.teacher, 1)
        return student.train(), teacher.eval().requires_grad_(False)

    def sequences(self) -> list[TokenSequence]:
        return sequences(self.rows, self.prompt, self.response, self.student.vocabulary)

    def pairs(self) -> list[TokenSequence]:
        """Neighbours share the prompt."""
        rows = sequences(2 * self.rows, self.prompt, self.response, self.student.vocabulary)
        return [TokenSequence(rows[i - i % 2].prompt_ids, row.response_ids) for i, row in enumerate(rows)]

    def corpus(self) -> list[TokenSequence]:
        """Blocks of plain text: every token but the first is predicted."""
        return sequences(self.rows, (0, 0), (self.length, self.length), self.student.vocabulary, seed=1)

    def padded(self, rows: list[TokenSequence]) -> peers.Padded:
        return peers.padded(rows, self.length, self.eos)


SIZES = {"real": Size(), "tiny": Size(*TINY_PAIR, 2, 32, (4, 8), (4, 16))}


def ours(
    name: str, size: Size, *, pairs: bool = False, stored: bool = False, pretrain: bool = False, shared: bool = True
) -> Step:
    return engine_step(
        name,
        size.models(),
        size.pairs() if pairs else size.sequences(),
        stored=stored,
        corpus=size.corpus() if pretrain else (),
        shared=shared,
    )


def _liger(size: Size) -> Step:
    return peers.liger(size.models(), size.sequences(), size.eos)


VARIANTS: dict[str, Callable[[Size], Step]] = {
    BASE: lambda s: peers.released("kl", s.models(), s.padded(s.sequences())),
    "released shape, DPKD token term": lambda s: peers.released("dpkd", s.models(), s.padded(s.sequences())),
    "released shape, DPKD + pre-training KD": lambda s: peers.released(
        "dpkd", s.models(), s.padded(s.sequences()), s.padded(s.corpus())
    ),
    "TRL generalized_jsd_loss, JSD": lambda s: peers.trl(s.models(), s.padded(s.sequences()), 0.5),
    "TRL generalized_jsd_loss, forward KL": lambda s: peers.trl(s.models(), s.padded(s.sequences()), 0.0),
    "TRL chunked divergence, JSD": lambda s: peers.trl_chunked(s.models(), s.padded(s.sequences()), 0.5),
    "TRL chunked divergence, forward KL": lambda s: peers.trl_chunked(s.models(), s.padded(s.sequences()), 0.0),
    "Liger chunked JSD, eager": _liger,
    "response only, dense, forward KL": lambda s: peers.dense("fkl", s.models(), s.sequences(), s.eos),
    "response only, dense, JSD": lambda s: peers.dense("jsd", s.models(), s.sequences(), s.eos),
    "pairs, full logits": lambda s: peers.full_pairs(s.models(), s.padded(s.pairs())),
    FLOOR: lambda s: peers.backbones(s.models(), s.sequences(), s.eos),
    FLOOR_OF_PAIRS: lambda s: peers.backbones(s.models(), s.pairs(), s.eos),
    FLOOR_OF_CORPUS: lambda s: peers.backbones(s.models(), s.corpus(), s.eos),
    "dpkd: fkl": lambda s: ours("fkl", s),
    "dpkd: rkl": lambda s: ours("rkl", s),
    "dpkd: jsd": lambda s: ours("jsd", s),
    "dpkd: akl": lambda s: ours("akl", s),
    "dpkd: distillm": lambda s: ours("distillm", s),
    "dpkd: minillm": lambda s: ours("minillm", s),
    "dpkd: dpkd-token": lambda s: ours("dpkd-token", s),
    "dpkd: dpkd-token + pre-training KD": lambda s: ours("dpkd-token", s, pretrain=True),
    "dpkd: dpkd pairs, prompts not shared": lambda s: ours("dpkd", s, pairs=True, shared=False),
    "dpkd: dpkd pairs": lambda s: ours("dpkd", s, pairs=True),
    "dpkd: dpkd pairs, teacher from a store": lambda s: ours("dpkd", s, pairs=True, stored=True),
}


def growth_mib(name: str, size: str) -> float:
    """Peak memory of this process above what it had with the models loaded, over two steps."""
    step = VARIANTS[name](SIZES[size])
    before = resident_mib()
    for _ in range(2):
        step()
    return peak_mib() - before


def floor_of(name: str) -> str:
    """The variant that has the same rows, and neither head nor loss.

    >>> floor_of("dpkd: dpkd pairs")
    'backbones alone, pairs (floor)'
    """
    if "pairs" in name:
        return FLOOR_OF_PAIRS
    return FLOOR_OF_CORPUS if "pre-training" in name or "corpus" in name else FLOOR


def available(names: list[str]) -> dict[str, str]:
    """Variant → why it cannot run here, or nothing."""
    found = dict.fromkeys(names, "")
    if "Liger chunked JSD, eager" in found:
        try:
            import liger_kernel.chunked_loss  # noqa: F401
        except ImportError as error:
            found["Liger chunked JSD, eager"] = f"not measured: {error} (Liger needs Triton, so it is not required)"
    return found


def table(names: list[str] | None = None, repeats: int = 5, size: str = "real", memory: bool = True) -> str:
    """The variants of these names, or all."""
    reasons = available(names or list(VARIANTS))
    runnable = [name for name, reason in reasons.items() if not reason]
    taken = seconds_of({name: VARIANTS[name](SIZES[size]) for name in runnable}, repeats)
    base = taken.get(BASE, max(taken.values()))
    grown = {name: call_in_process("step", "growth_mib", name, size) for name in runnable if memory}
    rows = []
    for name, reason in reasons.items():
        if reason:
            rows.append([name, reason, "–", "–"])
            continue
        peak = f"{grown[name]:,.0f}" if name in grown else "–"
        floor = grown.get(floor_of(name))
        share = f"{grown[name] / floor:.2f}" if name in grown and floor else "–"
        rows.append([name, f"{taken[name] / base:.2f}", peak, share])
    return markdown(["variant", "time, released shape = 1", "peak memory growth, MiB", "of its backbones' alone"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--only", action="append", choices=list(VARIANTS))
    parser.add_argument("--tiny", action="store_true", help="to see that it runs, not what it says")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    print(table(arguments.only, arguments.repeats, "tiny" if arguments.tiny else "real", memory=not arguments.tiny))


if __name__ == "__main__":
    main()
