"""A sum of KL divergences on a CPU: the kernel of `dpkd.models.cpu_kernels` beside the formula written with autograd.

Value and gradient of one chunk of logits of both models, 32 MiB each or 128 rows, without the products of the heads.

    python benchmarks/cpu_kernels.py [--repeats 5] [--tiny]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from harness import markdown, seconds_of

from dpkd.functional import KLSum, log_softmax
from dpkd.models.chunked import chunk_rows
from dpkd.models.cpu_kernels import kl_sum_

LOSSES = {
    "forward KL": KLSum(forward=1.0),
    "reverse KL": KLSum(reverse=1.0),
    "JSD": KLSum(forward=0.5, reverse=0.5, forward_share=0.5, reverse_share=0.5),
    "skew KL": KLSum(forward=1.0, forward_share=0.1),
    "likelihood": KLSum(likelihood=1.0),
}


def steps(vocabulary: int, terms: KLSum) -> dict[str, Callable[[], object]]:
    """Both ways; the kernel's gradient is its logits the next time, which changes no time."""
    rows = chunk_rows(vocabulary)
    student, teacher = torch.randn(rows, vocabulary), torch.randn(rows, vocabulary)
    own, ids = student.clone(), torch.zeros(rows, dtype=torch.long)

    def written() -> object:
        logits = student.detach().requires_grad_()
        log_p = log_softmax(teacher) if terms.reads_teacher else log_softmax(logits.detach()[:, :1])
        return torch.autograd.grad(terms.value(log_p, log_softmax(logits), ids).sum(), logits)

    def kernel() -> object:
        return kl_sum_(own, teacher if terms.reads_teacher else None, ids, terms, 1.0)

    return {"written": written, "kernel": kernel}


def table(repeats: int = 5, tiny: bool = False) -> str:
    rows = []
    for vocabulary in (64,) if tiny else (50257, 151936, 262144):
        for name, terms in LOSSES.items():
            taken = seconds_of(steps(vocabulary, terms), repeats)
            written, kernel = (f"{1000 * taken[way]:,.0f}" for way in ("written", "kernel"))
            rows.append([f"{vocabulary:,}", name, written, kernel, f"{taken['written'] / taken['kernel']:.1f}"])
    return markdown(["vocabulary", "sum", "as written, ms", "kernel, ms", "times as fast"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--tiny", action="store_true", help="to see that it runs, not what it says")
    arguments = parser.parse_args()
    print(table(arguments.repeats, arguments.tiny))


if __name__ == "__main__":
    main()
