"""On a GPU: whether the kernels are right, and how often the host waits in a step that is not logged."""

from __future__ import annotations

import math
import warnings
from functools import partial
from typing import Any

import torch
from gpu_tools import CUDA, DEVICE, Book, Numbers, models, wait
from ours import engine_step
from shapes import sequences


def part_check(book: Book, tiny: bool) -> None:
    """Kernels against float64 on this device; and how often the host waits in a step that is not logged."""
    from dpkd.functional import KLSum

    cases = {
        "forward": KLSum(forward=1.0),
        "reverse": KLSum(reverse=1.0),
        "jsd": KLSum(0.3, 0.7, forward_share=0.3, reverse_share=0.3),
        "kd": KLSum(forward=0.5, likelihood=0.5),
    }
    for name, terms in cases.items():
        book.take("kernels against float64", name, partial(kernel_errors, terms, 512 if tiny else 50257))
    pair = models("tiny" if tiny else "runs")
    for name in ("fkl", "jsd", "akl", "dpkd-token", "dpkd", "minillm"):
        book.take("host waits in a step", name, partial(host_waits, name, pair, tiny))


def kernel_errors(terms: Any, vocabulary: int) -> Numbers:
    """The largest error of values in nats, and of gradients as a share of the largest, in both types."""
    from dpkd.models.fused import why_not
    from dpkd.models.kernels import kl_sum_

    if (reason := why_not(DEVICE.type)) is not None:
        raise RuntimeError(reason)
    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        torch.manual_seed(1)
        z, y = (3 * torch.randn(64, vocabulary, device=DEVICE).to(dtype) for _ in range(2))
        ids = torch.randint(vocabulary, (64,), device=DEVICE)
        exact = z.double().requires_grad_()
        log_q, log_p = exact.log_softmax(-1), y.double().log_softmax(-1)
        expected = torch.stack([t if t is not None else exact.new_zeros(64) for t in terms.terms(log_p, log_q, ids)], 1)
        terms.value(log_p, log_q, ids).sum().backward()
        values = kl_sum_(z, y, ids, terms, 1.0)
        short = str(dtype).removeprefix("torch.")
        found[f"values {short}"] = float((values - expected).abs().max())
        found[f"gradient {short}"] = float((z - exact.grad).abs().max() / exact.grad.abs().max())
    return found


def host_waits(name: str, pair: tuple[Any, Any], tiny: bool) -> Numbers:
    """CUDA's own count of synchronizing calls in the third step."""
    vocabulary = pair[0].config.vocab_size
    many = sequences(2, (4, 8), (4, 8), vocabulary) if tiny else sequences(8, (64, 128), (32, 64), vocabulary)
    if name == "dpkd":
        many = [row._replace(prompt_ids=many[i - i % 2].prompt_ids) for i, row in enumerate(many)]
    step = engine_step(name, pair, many, bf16=True)
    step(), step()
    wait()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        if CUDA:
            torch.cuda.set_sync_debug_mode("warn")
        try:
            step()
        finally:
            if CUDA:
                torch.cuda.set_sync_debug_mode("default")
    waits = [one for one in said if "synchroniz" in str(one.message)]
    for one in waits[:5]:
        print(f"  {name} waits at {one.filename}:{one.lineno}", flush=True)
    return {"waits": float(len(waits)) if CUDA else math.nan}
