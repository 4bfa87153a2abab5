"""Losses over a large vocabulary without ever holding `[N, V]`: the output head runs on a few rows at a time.

Shapes: N rows (response positions), n rows of one chunk, V vocabulary, H hidden.

`objective` takes the gradient of each chunk at once, inside forward (the row weights, 1 / denominator, are known
before), and keeps only the gradients of hidden states and head. `token_logps` returns one log-prob per row and
computes its chunks again in backward. Both equal the dense computation.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor

from dpkd import functional
from dpkd.functional import gather_logps, log_softmax
from dpkd.models.attention import product_dtype
from dpkd.models.head import Head, LogitRule

# Called once per chunk with the student's logits [n, V] and the slice of rows; returns a weighted sum to minimise.
ChunkLoss = Callable[[Tensor, slice], Tensor]
# Called once per chunk with what the head's product gave [n, V], in its own type, and the slice of rows; puts the
# gradient by it in its place, and returns the weighted sum.
FusedLoss = Callable[[Tensor, slice], Tensor]
# Called once per chunk with log-probs [n, V] (no gradient) and the slice of rows.
Observer = Callable[[Tensor, slice], None]


# MiB of float32 logits of a chunk where nobody says: on a CPU the caches decide; a GPU must be filled.
CPU_MIB = 32.0
# On a GPU at most so much, and of the memory that is free: an elementwise kernel on 128 MiB takes some 60 microseconds,
# many times its launch, and a loss as written holds about ten such tensors at its peak.
GPU_MIB, GPU_SHARE = 128.0, 1 / 64
# A fused loss holds the logits of both models and nothing else, in half precision as much as one tensor in float32;
# each chunk costs a pass over the gradient of the head.
FUSED_MIB = 512.0
# On a CPU: a block of logits and what is computed from it stay in a core's cache. Two times as much is as fast, eight
# times is not.
BLOCK_BYTES = 2 * 2**20
LARGE = 100_000  # a vocabulary from which the gradient of the head weighs more than the caches do
FEWEST, FEWEST_OF_LARGE = 32, 128  # rows below which the matrix products suffer


def chunk_rows(
    vocabulary: int, mib: float | Literal["auto"] = "auto", device: torch.device | str = "cpu", *, fused: bool = False
) -> int:
    """Rows of float32 logits that fit the budget in MiB, or what suits the device; never so few that products suffer.

    For a `fused` loss a device decides differently: see FUSED_MIB.

    >>> chunk_rows(49152, 32.0), chunk_rows(49152), chunk_rows(151936)
    (170, 170, 128)
    """
    fewest = FEWEST
    if mib == "auto":
        mib = _auto_mib(torch.device(device), FUSED_MIB if fused else GPU_MIB)
        fewest = FEWEST_OF_LARGE if vocabulary > LARGE else FEWEST
    return max(fewest, int(mib * 2**20 / (4 * vocabulary)))


def _auto_mib(device: torch.device, most: float) -> float:
    if device.type != "cuda":
        return CPU_MIB
    free, _ = torch.cuda.mem_get_info(device)
    return max(CPU_MIB, min(most, GPU_SHARE * free / 2**20))


def chunks(rows: int, size: int, starts: Sequence[int] | None = None) -> Iterator[slice]:
    """Slices of at most `size` rows, of nearly equal length.

    `starts` are the rows at which a slice may begin, ascending and with 0; None: all. What stands between two of them
    stays together, and may make a slice longer.

    >>> [(s.start, s.stop) for s in chunks(10, 4)]
    [(0, 3), (3, 6), (6, 10)]
    >>> [(s.start, s.stop) for s in chunks(10, 4, [0, 1, 2, 4, 9])]
    [(0, 2), (2, 4), (4, 10)]
    """
    count = -(-rows // size)
    edges = [rows * i // count for i in range(count)] if count else []
    if starts is not None:
        edges = list(dict.fromkeys(starts[bisect_right(starts, edge) - 1] for edge in edges))
    for start, stop in zip(edges, [*edges[1:], rows][: len(edges)], strict=True):
        yield slice(start, stop)


def block_rows(vocabulary: int) -> int:
    """Rows of float32 logits of which a CPU's cache holds what is computed.

    >>> block_rows(50257)
    10
    """
    return max(1, BLOCK_BYTES // (4 * vocabulary))


def in_cache(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The same rows of tensors `[n, ...]`, few enough on a CPU that what is computed of the first stays in the cache.

    >>> [rows.shape[0] for rows, in in_cache(torch.zeros(5, 2**18))]
    [2, 2, 1]
    """
    first = tensors[0]
    size = first.shape[0] if first.device.type != "cpu" else block_rows(max(1, first.shape[1]))
    return zip(*(one.split(max(1, size)) for one in tensors), strict=True)


def _without_autocast(weight: Tensor) -> torch.autocast:
    return torch.autocast(weight.device.type, enabled=False)


def _wide(raw_NV: Tensor) -> Tensor:
    return raw_NV if raw_NV.dtype == torch.float64 else raw_NV.float()


@cache
def adds_wide(kind: str, dtype: torch.dtype) -> bool:
    """Whether a product of a narrow type adds to a float32 matrix in one operation on a kind of device: it is tried."""
    if kind != "cuda":
        return False
    try:
        ones, found = torch.ones(16, 16, dtype=dtype, device=kind), torch.full((16, 16), torch.nan, device=kind)
        for beta in (0, 1):  # the first one is written over what memory happens to hold
            torch.addmm(found, ones.t(), ones, beta=beta, out_dtype=torch.float32, out=found)
    except Exception:  # of a PyTorch that has no such product: it is added in a second operation
        return False
    return bool((found == 32.0).all())


class _HeadGradient:
    """Gradients of hidden states, head weight and bias, gathered chunk by chunk."""

    def __init__(self, hidden: Tensor, head: Head, needs: Sequence[bool]) -> None:
        wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        self.head = head
        self.begun = False  # the first chunk's product is written, those of the others are added
        self.hidden = torch.empty_like(hidden) if needs[0] else None
        self.weight = torch.empty_like(head.weight, dtype=wide) if needs[1] else None
        self.bias = torch.zeros_like(head.bias, dtype=wide) if needs[2] and head.bias is not None else None

    def add(self, rows: slice, hidden_nH: Tensor, grad_nV: Tensor) -> None:
        narrow_nV = self.head.whole(grad_nV)
        if self.hidden is not None:
            self.hidden[rows] = narrow_nV @ self.head.weight
        if self.weight is not None:
            beta = int(self.begun)
            if self.weight.dtype == narrow_nV.dtype:
                self.weight.addmm_(narrow_nV.t(), hidden_nH, beta=beta)
            elif adds_wide(narrow_nV.device.type, narrow_nV.dtype):
                torch.addmm(
                    self.weight, narrow_nV.t(), hidden_nH, beta=beta, out_dtype=self.weight.dtype, out=self.weight
                )
            elif self.begun:
                self.weight.add_(narrow_nV.t() @ hidden_nH)
            else:
                self.weight.copy_(narrow_nV.t() @ hidden_nH)
            self.begun = True
        if self.bias is not None:
            self.bias[: grad_nV.shape[1]] += grad_nV.sum(0)

    @property
    def of_head(self) -> tuple[Tensor | None, Tensor | None]:
        """The gradients of weight and bias."""
        tokens = self.head.vocabulary
        if self.weight is not None and not self.begun:
            self.weight.zero_()
        if tokens is None:
            return self.weight, self.bias
        weight, bias = (None if one is None else one[:tokens] for one in (self.weight, self.bias))
        return weight, bias


def _as_written(
    chunk_loss: ChunkLoss,
    rule: LogitRule,
    start: int,
    blocks: Iterable[tuple[Tensor, ...]],
    sums: Sequence[Tensor],
    parameters: Sequence[Tensor],
    needs_gradient: bool,
) -> tuple[Tensor | float, bool]:
    """The loss of blocks of raw logits `[b, V]`, of which the first is row `start`; and whether it depends on them.

    The gradient by the logits takes their place, that by `parameters` is added to `sums`.
    """
    total: Tensor | float = 0.0
    reached = False
    for (raw_bV,) in blocks:
        rows, start = slice(start, start + len(raw_bV)), start + len(raw_bV)
        with torch.set_grad_enabled(needs_gradient):
            leaf_bV = raw_bV.detach().requires_grad_(needs_gradient)
            loss = chunk_loss(rule(leaf_bV), rows)
        total = total + loss.detach()
        if not (needs_gradient and loss.requires_grad):
            raw_bV.zero_()
            continue
        by_logits, *by_parameters = torch.autograd.grad(loss, [leaf_bV, *parameters], allow_unused=True)
        for kept, new in zip(sums, by_parameters, strict=True):
            if new is not None:
                kept += new
        reached |= by_logits is not None
        if by_logits is None:
            raw_bV.zero_()
        else:
            raw_bV.copy_(by_logits)
        del loss, by_logits, by_parameters  # else they are there still when the next block is at its peak
    return total, reached


class _Objective(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        chunk_loss: ChunkLoss,
        fused: FusedLoss | None,
        rule: LogitRule,
        size: int,
        starts: Sequence[int] | None,
        in_blocks: bool,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        *parameters: Tensor,
    ) -> Tensor:
        dtype = product_dtype(weight)
        head = Head(weight.detach(), None if bias is None else bias.detach(), rule).cast(dtype)
        gradient = _HeadGradient(hidden, head, ctx.needs_input_grad[6:9])
        parameter_gradients = [torch.zeros_like(p) for p in parameters]
        total = hidden.new_zeros((), dtype=torch.float64 if hidden.dtype == torch.float64 else torch.float32)
        needs_gradient = any(ctx.needs_input_grad[6:])
        with _without_autocast(weight):
            for rows in chunks(hidden.shape[0], size, starts):
                hidden_nH = hidden[rows].detach().to(dtype)
                raw_nV = head.raw(hidden_nH)
                if fused is not None:
                    total += fused(raw_nV, rows)
                    gradient.add(rows, hidden_nH, raw_nV)
                    continue
                raw_nV = _wide(raw_nV)
                blocks = in_cache(raw_nV) if in_blocks and starts is None else [(raw_nV,)]
                found, reached = _as_written(
                    chunk_loss, rule, rows.start, blocks, parameter_gradients, parameters, needs_gradient
                )
                total += found
                if reached:
                    gradient.add(rows, hidden_nH, raw_nV)
                elif gradient.hidden is not None:
                    gradient.hidden[rows] = 0
                del raw_nV, blocks  # else they are there still when the next chunk is at its peak
        ctx.dtypes = (weight.dtype, None if bias is None else bias.dtype)
        # Not saved as tensors are: backward gives them away, so that nobody has to copy a matrix of the head's size.
        ctx.gradients = [gradient.hidden, *gradient.of_head, *parameter_gradients]
        return total

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:
        (factor,) = grad_outputs
        if ctx.gradients is None:
            raise RuntimeError("a loss in chunks goes backward once: its gradients were given away the first time")
        (hidden, weight, bias, *parameters), ctx.gradients = ctx.gradients, None
        # The engine folds every factor into the row weights: this is a multiplication by 1, but for who looks.
        if not (functional.free_to_read(factor.device) and float(factor) == 1.0):
            for gradient in (hidden, weight, bias, *parameters):
                if gradient is not None:
                    gradient.mul_(factor.to(gradient.dtype))
        weight_dtype, bias_dtype = ctx.dtypes
        weight = None if weight is None else weight.to(weight_dtype)
        bias = None if bias is None else bias.to(bias_dtype)
        return None, None, None, None, None, None, hidden, weight, bias, *parameters


def objective(
    chunk_loss: ChunkLoss,
    hidden: Tensor,
    head: Head,
    size: int,
    parameters: Sequence[Tensor] = (),
    starts: Sequence[int] | None = None,
    fused: FusedLoss | None = None,
    in_blocks: bool = False,
) -> Tensor:
    """Sum of `chunk_loss` over all chunks, with gradients for hidden `[N, H]`, the head, and `parameters`.

    `chunk_loss(logits [n, V], rows)` returns the weighted sum of its rows; `starts` are the rows at which a chunk may
    begin (None: all). `fused(raw [n, V], rows)`, where there is one, takes its place: it returns the sum and leaves the
    gradient by the raw logits where these were. No `[N, V]` tensor outlives its chunk.

    With `in_blocks`, `chunk_loss` is called for so few rows of a chunk that a CPU's cache holds what it computes: for
    callers that have what it reads of a chunk at hand.
    """
    head = head.plain()
    return _Objective.apply(  # type: ignore[no-any-return, no-untyped-call]
        chunk_loss, fused, head.rule, size, starts, in_blocks, hidden, head.weight, head.bias, *parameters
    )


class _TokenLogps(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        rule: LogitRule,
        size: int,
        observer: Observer | None,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
    ) -> Tensor:
        dtype = product_dtype(weight)
        head = Head(weight.detach(), None if bias is None else bias.detach(), rule).cast(dtype)
        logps = hidden.new_empty(
            hidden.shape[0], dtype=torch.float64 if hidden.dtype == torch.float64 else torch.float32
        )
        with _without_autocast(weight):
            for rows in chunks(hidden.shape[0], size):
                raw_nV = head.raw(hidden[rows].detach().to(dtype))
                if observer is None:
                    for raw_bV, targets_b, logps_b in in_cache(raw_nV, targets[rows], logps[rows]):
                        logps_b.copy_(gather_logps(log_softmax(rule(_wide(raw_bV))), targets_b))
                else:
                    log_q_nV = log_softmax(rule(_wide(raw_nV)))
                    logps[rows] = gather_logps(log_q_nV, targets[rows])
                    observer(log_q_nV, rows)
                    del log_q_nV  # before the next chunk is made
                del raw_nV
        ctx.rule, ctx.size, ctx.dtype = rule, size, dtype
        ctx.save_for_backward(hidden, weight, bias, targets)
        return logps

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:
        (grad_N,) = grad_outputs
        hidden, weight, bias, targets = ctx.saved_tensors
        head = Head(weight.detach(), None if bias is None else bias.detach(), ctx.rule).cast(ctx.dtype)
        gradient = _HeadGradient(hidden, head, ctx.needs_input_grad[3:6])
        with _without_autocast(weight):
            for rows in chunks(hidden.shape[0], ctx.size):
                hidden_nH = hidden[rows].detach().to(ctx.dtype)
                raw_nV = _wide(head.raw(hidden_nH))
                for raw_bV, targets_b, grad_b in in_cache(raw_nV, targets[rows], grad_N[rows]):
                    raw_bV.copy_(_logp_gradient(raw_bV, ctx.rule, targets_b, grad_b))
                gradient.add(rows, hidden_nH, raw_nV)
        of_weight, of_bias = gradient.of_head
        weight_grad = None if of_weight is None else of_weight.to(weight.dtype)
        bias_grad = None if of_bias is None or bias is None else of_bias.to(bias.dtype)
        return None, None, None, gradient.hidden, weight_grad, bias_grad, None


def _logp_gradient(raw_nV: Tensor, rule: LogitRule, targets_n: Tensor, grad_n: Tensor) -> Tensor:
    """Gradient `[n, V]` of `Σ grad · log softmax(rule(raw))[target]` with respect to the raw logits."""
    if rule.is_identity:
        gradient_nV = torch.softmax(raw_nV, -1).mul_(-grad_n.unsqueeze(-1))
        return gradient_nV.scatter_add_(-1, targets_n.unsqueeze(-1), grad_n.unsqueeze(-1))
    with torch.enable_grad():
        raw_nV = raw_nV.detach().requires_grad_()
        total = (gather_logps(log_softmax(rule(raw_nV)), targets_n) * grad_n).sum()
    return torch.autograd.grad(total, raw_nV)[0]


def token_logps(hidden: Tensor, head: Head, targets: Tensor, size: int, observer: Observer | None = None) -> Tensor:
    """Log-prob `[N]` in nats of the target of each row; its chunks are computed again in backward.

    `observer(log_probs [n, V], rows)` sees each chunk of the forward pass, for metrics.
    """
    head = head.plain()
    return _TokenLogps.apply(  # type: ignore[no-any-return, no-untyped-call]
        head.rule, size, observer, hidden, head.weight, head.bias, targets
    )
