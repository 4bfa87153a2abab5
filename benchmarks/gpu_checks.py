"""On a GPU: whether the kernels are right, and how often the host waits in a step that is not logged."""

from __future__ import annotations

import math
import time
import warnings
from functools import partial
from typing import Any

import torch
from gpu_tools import CUDA, DEVICE, Book, Numbers, models, wait
from ours import engine_step, usual_layout
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
    for shape in [(512, 4)] if tiny else [(151936, 853), (50304, 2500)]:
        for name in ("forward", "jsd"):
            what = f"{name}, {shape[1]:,} rows of {shape[0]:,}"
            book.take("kernels, time", what, partial(kernel_time, cases[name], *shape))
    for name in ("fused", "as written"):
        book.take("head against float64", name, partial(head_errors, name == "fused", 513 if tiny else 50257))
    pair = models("tiny" if tiny else "runs")
    book.take("packed rows against padded ones", "student", partial(packed_gap, pair[0], tiny))
    book.take("packed rows against padded ones", "teacher", partial(packed_gap, pair[1], tiny))
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


def kernel_time(terms: Any, vocabulary: int, rows: int) -> Numbers:
    """Milliseconds of one call in bfloat16, and what they move: logits are read three times and written once."""
    from dpkd.models.fused import why_not
    from dpkd.models.kernels import kl_sum_

    if (reason := why_not(DEVICE.type)) is not None:
        raise RuntimeError(reason)
    z, y = (2 * torch.randn(rows, vocabulary, device=DEVICE).bfloat16() for _ in range(2))
    ids = torch.zeros(rows, dtype=torch.long, device=DEVICE)
    kl_sum_(z, y, ids, terms, 1.0)
    count = 10 if CUDA else 1
    wait()
    began = time.perf_counter()
    for _ in range(count):
        kl_sum_(z, y, ids, terms, 1.0)
    wait()
    seconds = (time.perf_counter() - began) / count
    return {"ms": 1000 * seconds, "GB/s": 7 * 2 * rows * vocabulary / seconds / 1e9}


def head_errors(fused: bool, vocabulary: int) -> Numbers:
    """The gradients by hidden states and head of a sum of forward KL, chunk by chunk in bf16; shares of the largest."""
    from dpkd.functional import KLSum, at_least_float32, kl
    from dpkd.models.chunked import objective
    from dpkd.models.fused import FusedKL
    from dpkd.models.head import Head, LogitRule

    torch.manual_seed(2)
    hidden, head, of_teacher = (torch.randn(n, 64, device=DEVICE) / 4 for n in (200, vocabulary, vocabulary))
    targets, rule = torch.zeros(200, dtype=torch.long, device=DEVICE), LogitRule()
    teacher = Head(of_teacher.bfloat16(), None, rule)

    @torch.no_grad()
    def raw(rows: slice) -> tuple[torch.Tensor, float]:
        return teacher.raw(hidden[rows].bfloat16()), 1.0

    def chunk_loss(logits: torch.Tensor, rows: slice) -> torch.Tensor:
        return kl(at_least_float32(raw(rows)[0]).log_softmax(-1), logits.log_softmax(-1)).sum()

    kernel = FusedKL(KLSum(forward=1.0), 1.0, rule, targets, raw, lambda *_: None) if fused else None
    leaves = [hidden.clone().requires_grad_(), head.clone().requires_grad_()]
    with torch.autocast(DEVICE.type, torch.bfloat16):
        objective(chunk_loss, leaves[0], Head(leaves[1], None, rule), 70, fused=kernel).backward()
    exact = [one.bfloat16().double().requires_grad_() for one in (hidden, head)]
    log_p = (hidden.bfloat16().double() @ of_teacher.bfloat16().double().t()).log_softmax(-1)
    log_q = (exact[0] @ exact[1].t()).log_softmax(-1)
    (log_p.exp() * (log_p - log_q)).sum().backward()
    gaps = [float((a.grad - b.grad).abs().max() / b.grad.abs().max()) for a, b in zip(leaves, exact, strict=True)]
    return dict(zip(("gradient of hidden", "gradient of head"), gaps, strict=True))


def packed_gap(model: Any, tiny: bool) -> Numbers:
    """Hidden states, and the gradient of a first weight, of rows without padding; shares of the largest number."""
    from dpkd.data.batches import PLAIN, collate
    from dpkd.models.fused_layers import fuse_layers
    from dpkd.models.head import hidden_rows
    from dpkd.models.layouts import why_not

    fuse_layers(model)
    usual, found = usual_layout(DEVICE, bf16=True), []
    many = sequences(2, (4, 8), (4, 8), 512) if tiny else sequences(32, (192, 256), (64, 256), 50257)
    weights = [p for p in model.parameters() if p.requires_grad and p.ndim == 2][:1]
    with torch.autocast(DEVICE.type, torch.bfloat16):
        if (reason := why_not(model, usual)) is not None:
            raise RuntimeError(reason)
        for layout in (PLAIN, usual):
            batch = collate(many, pad_id=0, layout=layout).to(DEVICE)
            with torch.set_grad_enabled(bool(weights)):
                hidden = hidden_rows(model, batch).float()
            direction = torch.arange(hidden.numel(), device=DEVICE).sin().view_as(hidden)
            grads = torch.autograd.grad((hidden * direction).sum(), weights) if weights else ()
            found.append([hidden.detach(), *grads])
    gaps = [float((a - b).abs().max() / a.abs().max()) for a, b in zip(*found, strict=True)]
    return dict(zip(("values", "gradient"), gaps, strict=False))


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
    # Of its own accord the mode says once that it is a prototype.
    waits = [one for one in said if "called a synchronizing" in str(one.message)]
    for one in waits[:5]:
        print(f"  {name} waits at {one.filename}:{one.lineno}", flush=True)
    return {"waits": float(len(waits)) if CUDA else math.nan}
