"""The student and its losses in one module with one forward: this is what DDP and FSDP wrap.

Shapes: N response positions of the micro-batch, n of one chunk, V shared vocabulary, B pairs.
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from dpkd.api import Layers, Pair, PairInputs, RolloutInputs, Signal, TokenInputs
from dpkd.api.inputs import TOKEN_LOGPS, Part
from dpkd.errors import DpkdError, described
from dpkd.functional import at_least_float32, by_segment, log_softmax, segment_sum
from dpkd.models.chunked import chunk_rows, chunks, in_cache, objective, token_logps
from dpkd.models.compile import uncompiled
from dpkd.models.device import out_of_memory
from dpkd.models.fused import FusedKL, kl_sum_of, usable
from dpkd.models.head import Head, evaluating, head_of
from dpkd.models.layers import layer_rows
from dpkd.models.sharding import gathered
from dpkd.train.mean_metrics import MeanMetrics
from dpkd.train.microbatch import MicroBatch, Term
from dpkd.train.observe import observe_pairs, observe_rows, observe_spans

T = TypeVar("T")


class LossModule(nn.Module):
    """Runs the student on a micro-batch and returns what to minimise, with the metrics of its metrics."""

    def __init__(
        self,
        student: nn.Module,
        losses: Mapping[str, nn.Module],
        *,
        vocabulary: int,
        chunk_mib: float | Literal["auto"] = "auto",
        layers: Mapping[str, Layers] | None = None,
        widest: int | None = None,
        chosen: int = 0,
        reward_scale: float = 1.0,
    ) -> None:
        """`layers` has the hidden states that losses read, by the name of the loss.

        `chosen` is how many of the student's likeliest tokens they read (Signal.CHOSEN_IDS).

        `widest` is the number of logits of a row where a loss sees more than the student's vocabulary.
        `reward_scale` is β of the implicit reward that is logged.
        """
        super().__init__()
        self.reward_scale = reward_scale
        # A loss runs once a chunk, of which processes may have different numbers: what counts calls must not see these.
        self.hooks_on_losses = True
        self.student = student
        self.losses = nn.ModuleDict(losses)
        self.layers = dict(layers or {})
        self.vocabulary = vocabulary
        self.chosen = min(chosen, vocabulary)
        device = next(student.parameters()).device
        self.chunk = chunk_rows(widest or vocabulary, chunk_mib, device)
        self.fused_chunk = chunk_rows(widest or vocabulary, chunk_mib, device, fused=True)

    def lend(self, work: Callable[[nn.Module], T]) -> T:
        """Give the student, with whole weights, to work that is not training: sampling, evaluation, saving.

        All processes call it together; what they do with it may differ.
        """
        with torch.no_grad(), gathered(self.student), uncompiled(self.student):
            return work(self.student)

    def _values(self, name: str, x: Any, rows: int, device: torch.device) -> Tensor:
        """The values of a loss, one a row. Raises DpkdError when it fails, or returns what training cannot use."""
        loss = self.losses[name]
        try:
            values: Any = loss(x) if self.hooks_on_losses else loss.forward(x)
        except (DpkdError, KeyboardInterrupt):
            raise
        except BaseException as error:  # sys.exit too: a plugin does not end a run
            if isinstance(error, RuntimeError) and out_of_memory(error) is not None:
                raise
            raise DpkdError(f"{_of_plugin(loss)} failed: {described(error)}{_place(error, loss)}") from error
        if not isinstance(values, Tensor) or values.shape != (rows,) or not values.is_floating_point():
            found = f"{values.dtype} {list(values.shape)}" if isinstance(values, Tensor) else type(values).__name__
            raise DpkdError(
                f"{_of_plugin(loss)} returned {found}; expected one number a row: float32 [{rows}]. A loss takes no "
                "mean and no sum: the engine divides. `dpkd check-loss` finds this before a run"
            )
        if values.device != device:
            raise DpkdError(
                f"{_of_plugin(loss)} returned values on the device {values.device}; expected {device}, where its "
                "inputs are. A loss moves no tensor: look for .to(...), .cpu() or a `device=` in its forward"
            )
        if rows and torch.is_grad_enabled() and not values.requires_grad:
            raise DpkdError(
                f"{_of_plugin(loss)} returned values without a gradient: nothing would be learned. Look for .detach(), "
                ".item(), torch.no_grad() or argmax in its forward. `dpkd check-loss` finds this before a run"
            )
        return values

    def layers_of(self, micro_batch: MicroBatch) -> Layers:
        """The hidden states that the losses of this micro-batch read."""
        read = [self.layers[term.name] for term in micro_batch.terms if term.name in self.layers]
        student, teacher = ({i for layers in read for i in layers[of]} for of in (0, 1))
        return Layers(tuple(sorted(student)), tuple(sorted(teacher)))

    @torch.no_grad()
    def _likeliest(self, micro_batch: MicroBatch) -> Tensor:
        """The student's likeliest tokens `[N, K]` at each response position, by a forward of their own."""
        with evaluating(self.student):
            hidden, _ = layer_rows(self.student, micro_batch.batch, ())
        head = head_of(self.student, self.vocabulary)
        parts = [self._top(head.logits(hidden[rows])) for rows in chunks(hidden.shape[0], self.chunk)]
        return torch.cat(parts) if parts else torch.zeros(0, self.chosen, dtype=torch.long, device=hidden.device)

    def _top(self, logits_nV: Tensor) -> Tensor:
        return logits_nV.detach().topk(self.chosen, dim=-1).indices

    def forward(self, micro_batch: MicroBatch, *, choose: bool = False) -> Any:
        """What to minimise, and the metrics; to `choose`, the student's likeliest tokens instead.

        All that a step asks of the student goes through here: what wraps this module gathers its weights then.
        """
        if choose:
            return self._likeliest(micro_batch)
        hidden, states = layer_rows(self.student, micro_batch.batch, self.layers_of(micro_batch).student)
        head = head_of(self.student, self.vocabulary)
        if micro_batch.pairs:
            total, metrics = self._pairs(micro_batch, hidden, head)
            # Every weight has a gradient in every forward: several processes wait for it.
            return total + 0.0 * sum(p.sum() for p in self.losses.parameters() if p.requires_grad), metrics
        total, metrics = self._rows(micro_batch, hidden, head)
        for term in micro_batch.terms:
            if term.name in self.layers:
                total = total + self._on_hidden(micro_batch, term, states, metrics)
        return total, metrics

    def _rows(self, micro_batch: MicroBatch, hidden: Tensor, head: Head) -> tuple[Tensor, MeanMetrics]:
        """Token and rollout losses on logits: the gradient of each chunk is taken at once."""
        metrics = MeanMetrics()
        terms = [term for term in micro_batch.terms if term.name not in self.layers]
        if not terms and not micro_batch.measured:
            hidden = hidden[:0]  # nobody looks at logits
        token_logps_N = hidden.new_zeros(2, hidden.shape[0], dtype=torch.float32)

        def measure(x: TokenInputs, rows: slice) -> None:
            log_p_nV = x.teacher_log_probs() if micro_batch.measurable else None
            observe_rows(x.student_log_probs(), log_p_nV, x.targets, metrics, token_logps_N[:, rows])

        def chunk_loss(logits_nV: Tensor, rows: slice) -> Tensor:
            x, with_teacher = self._inputs(micro_batch, logits_nV, rows)
            total = logits_nV.new_zeros(())
            for term in terms:
                whole = with_teacher if Signal.TEACHER_LOGITS in term.reads else x
                own = whole.only(term.reads)
                values_n = self._values(term.name, own, whole.rows, logits_nV.device)
                total = total + term.share(values_n, micro_batch.processes)
                _add_term(metrics, term.name, values_n, own.named_parts)
            if micro_batch.measured:
                measure(x, rows)
            return total

        parameters = [p for p in self.losses.parameters() if p.requires_grad]
        fused = self._fused(micro_batch, terms, head, metrics, measure)
        starts = None if micro_batch.aligned is None else micro_batch.aligned.student.starts(hidden.shape[0])
        size = self.chunk if fused is None else self.fused_chunk
        total = objective(chunk_loss, hidden, head, size, parameters, starts, fused, in_blocks=True)
        if micro_batch.aligned is not None:
            observe_spans(micro_batch.aligned, hidden.shape[0], metrics)
        if micro_batch.measured:
            self._observe_responses(micro_batch, token_logps_N, metrics)
        return total, metrics

    def _fused(
        self,
        micro_batch: MicroBatch,
        terms: Sequence[Term],
        head: Head,
        metrics: MeanMetrics,
        measure: Callable[[TokenInputs, slice], None],
    ) -> FusedKL | None:
        """The one loss of a micro-batch as a kernel, where it is a sum of KL divergences."""
        if len(terms) != 1 or micro_batch.aligned is not None or not usable(head):
            return None
        term, teacher = terms[0], micro_batch.teacher
        terms_of = kl_sum_of(self.losses[term.name])
        if terms_of is None or (teacher is None and terms_of.reads_teacher):
            return None

        def observe(values_n: Tensor, parts: Mapping[str, Tensor]) -> None:
            _add_term(metrics, term.name, values_n, {name: Part(column_n) for name, column_n in parts.items()})

        def look(raw_nV: Tensor, rows: slice) -> None:
            start = rows.start
            for part in raw_nV.split(self.chunk):
                for (raw_bV,) in in_cache(part):
                    here, start = slice(start, start + len(raw_bV)), start + len(raw_bV)
                    measure(self._inputs(micro_batch, head.rule(at_least_float32(raw_bV)), here)[0], here)

        weight = term.weight * micro_batch.processes / term.denominator
        of_teacher = None if teacher is None or not terms_of.reads_teacher else teacher.raw
        looked = look if micro_batch.measured else None
        return FusedKL(terms_of, weight, head.rule, micro_batch.batch.targets, of_teacher, observe, looked)

    def _observe_responses(self, micro_batch: MicroBatch, token_logps_N: Tensor, metrics: MeanMetrics) -> None:
        """Lengths and implicit rewards of whole responses, by who wrote them."""
        lengths = micro_batch.batch.lengths
        log_q, log_p = (segment_sum(row, micro_batch.batch.sequence, len(lengths)) for row in token_logps_N)
        for writer in dict.fromkeys(r.writer for r in micro_batch.responses):
            of = torch.tensor([r.writer is writer for r in micro_batch.responses], device=log_q.device)
            metrics.mean(f"length/{writer}", lengths[of].float())
            if micro_batch.measurable:
                metrics.mean(f"reward/{writer}", self.reward_scale * (log_q - log_p)[of])

    def _inputs(self, micro_batch: MicroBatch, logits_nV: Tensor, rows: slice) -> tuple[TokenInputs, TokenInputs]:
        """What losses read of a chunk, and what those read that read the teacher: the same where tokenizers are.

        Across tokenizers the rows of the second are spans of text.
        """
        nothing_n = logits_nV.new_zeros(len(logits_nV))  # a token is a span of its own
        signals: dict[Signal, Tensor] = {
            Signal.STUDENT_LOGITS: logits_nV,
            Signal.TARGETS: micro_batch.batch.targets[rows],
            Signal.STUDENT_REST: nothing_n,
            Signal.TEACHER_REST: nothing_n,
            **{signal: values[rows] for signal, values in micro_batch.extra.items()},
        }
        if micro_batch.reads(Signal.CHOSEN_IDS) and Signal.CHOSEN_IDS not in signals:
            signals[Signal.CHOSEN_IDS] = self._top(logits_nV)
        kind = RolloutInputs if Signal.ADVANTAGES in micro_batch.extra else TokenInputs
        if micro_batch.teacher is None or not (micro_batch.measurable or micro_batch.reads(Signal.TEACHER_LOGITS)):
            x = kind(signals)
            return x, x
        of_teacher = micro_batch.teacher.signals(logits_nV, signals[Signal.TARGETS], rows)
        if Signal.STUDENT_LOGITS in of_teacher:
            return kind(signals), TokenInputs(of_teacher)
        x = kind({**signals, **of_teacher})
        return x, x

    def _on_hidden(
        self, micro_batch: MicroBatch, term: Term, states: Mapping[int, Tensor], metrics: MeanMetrics
    ) -> Tensor:
        """A loss on hidden states: on all rows at once, with the gradient of plain autograd."""
        layers, signals = self.layers[term.name], {Signal.TARGETS: micro_batch.batch.targets}
        if layers.student:
            signals[Signal.STUDENT_HIDDEN] = torch.stack([states[i] for i in layers.student], 1)
        if layers.teacher:
            assert micro_batch.teacher is not None  # the plan refuses it
            signals[Signal.TEACHER_HIDDEN] = torch.stack([micro_batch.teacher.layers[i] for i in layers.teacher], 1)
        x = TokenInputs(signals).only(term.reads)
        with torch.autocast(micro_batch.batch.targets.device.type, enabled=False):
            values_N = self._values(term.name, x, len(signals[Signal.TARGETS]), signals[Signal.TARGETS].device)
        _add_term(metrics, term.name, values_N, x.named_parts)
        return term.share(values_N, micro_batch.processes)

    def _pairs(self, micro_batch: MicroBatch, hidden: Tensor, head: Head) -> tuple[Tensor, MeanMetrics]:
        """Pair losses: log-probs of whole responses, their chunks computed again in backward."""
        metrics = MeanMetrics()
        batch = micro_batch.batch

        def observer(log_q_nV: Tensor, rows: slice) -> None:
            log_p_nV = log_softmax(micro_batch.teacher.logits(rows)) if micro_batch.teacher is not None else None
            observe_rows(log_q_nV, log_p_nV, batch.targets[rows], metrics)

        logps_N = token_logps(hidden, head, batch.targets, self.chunk, observer if micro_batch.measure else None)
        lengths = Pair(*batch.lengths.to(logps_N.dtype).clamp(min=1).chunk(2))
        real = micro_batch.real_pairs
        signals = {Signal.LENGTHS: lengths, **by_response(micro_batch, logps_N)}
        student = signals[Signal.STUDENT_LOGPS]
        total = logps_N.new_zeros(())
        for term in micro_batch.terms:
            if term.of_chosen:
                nll_B = _some(-student.chosen, real)
                total = total + term.share(nll_B, micro_batch.processes)
                metrics.add(f"loss/{term.name}", nll_B.sum(), micro_batch.chosen_tokens)
                continue
            reads = {signal: value for signal, value in signals.items() if signal in term.reads}
            x = PairInputs(reads)
            values_B = _some(self._values(term.name, x, len(student.chosen), logps_N.device), real)
            total = total + term.share(values_B, micro_batch.processes)
            parts = {
                name: Part(_some(values, real), None if of is None else _some(of, real))
                for name, (values, of) in x.named_parts.items()
            }
            _add_term(metrics, term.name, values_B, parts)
        if micro_batch.measure and micro_batch.responses:
            observe_pairs(student, signals.get(Signal.TEACHER_LOGPS), lengths, self.reward_scale, metrics)
        return total, metrics


def by_response(micro_batch: MicroBatch, student_N: Tensor) -> dict[Signal, Pair]:
    """Log-probs of the response tokens as sums over the responses, and token by token where a loss reads them."""
    batch = micro_batch.batch
    known = {
        Signal.STUDENT_LOGPS: student_N,
        Signal.TEACHER_LOGPS: micro_batch.teacher_logps,
        Signal.REFERENCE_LOGPS: micro_batch.reference_logps,
    }
    signals = {}
    for signal, logps_N in known.items():
        if logps_N is None:
            continue
        signals[signal] = Pair(*segment_sum(logps_N, batch.sequence, len(batch.lengths)).chunk(2))
        if micro_batch.reads(TOKEN_LOGPS[signal]):
            logps_BT = by_segment(logps_N, batch.sequence, batch.lengths, batch.longest_response)
            signals[TOKEN_LOGPS[signal]] = Pair(*logps_BT.chunk(2))
    return signals


def _of_plugin(loss: nn.Module) -> str:
    return f"the loss {type(loss).__name__} ({type(loss).__module__})"


def _place(error: BaseException, loss: nn.Module) -> str:
    """Where in the loss's own file an error came from, as the end of a sentence."""
    file = getattr(sys.modules.get(type(loss).__module__), "__file__", None)
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
    return f" ({file}:{lines[-1]})" if lines else ""


def _some(values_B: Tensor, pairs: list[int] | None) -> Tensor:
    """The values of some pairs; None: of all."""
    return values_B if pairs is None else values_B[torch.tensor(pairs, dtype=torch.long, device=values_B.device)]


def _add_term(metrics: MeanMetrics, name: str, values: Tensor, parts: Mapping[str, Part]) -> None:
    """The value of a term, and the parts that its loss named: those of the main loss by their own name."""
    metrics.add(f"loss/{name}", values.sum(), values.numel())
    for part, (part_values, of) in parts.items():
        metrics.mean(f"part/{part}" if name == "main" else f"part/{name}/{part}", part_values, of)
