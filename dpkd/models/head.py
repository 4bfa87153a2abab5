"""A causal language model as two parts: a backbone that gives hidden states, and an output head.

The head is applied chunk by chunk (`dpkd.models.chunked`), so what the model itself does to its logits (bias, scale,
soft-cap) is described here, and checked against the model's own logits before it is trusted.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from inspect import signature
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dpkd.errors import DpkdError
from dpkd.models.attention import attending
from dpkd.models.captured import captured

if TYPE_CHECKING:
    from dpkd.data.batches import Batch


# Where products want a number of tokens that is a multiple of this one: for 50,257 of them, GPT-2's vocabulary, cuBLAS
# has slow kernels only.
ALIGNED_ON, ALIGNED = ("cuda",), 64


@dataclass(frozen=True)
class LogitRule:
    """What a model does to the output of its last matrix product: `cap · tanh(scale · z / cap)`."""

    scale: float = 1.0
    softcap: float | None = None

    @property
    def is_identity(self) -> bool:
        return self.scale == 1.0 and self.softcap is None

    def __call__(self, raw_NV: Tensor) -> Tensor:
        if self.scale != 1.0:
            raw_NV = raw_NV * self.scale
        if self.softcap is not None:
            raw_NV = torch.tanh(raw_NV / self.softcap) * self.softcap
        return raw_NV


@dataclass(frozen=True)
class Head:
    """The output head, cut to the shared vocabulary: weight `[V, H]`, bias `[V]` or None, and the logit rule.

    The weight of an `aligned` head has further rows, which are zero; `vocabulary` is then the number of tokens.
    """

    weight: Tensor
    bias: Tensor | None
    rule: LogitRule
    vocabulary: int | None = None

    def raw(self, hidden_NH: Tensor) -> Tensor:
        """The matrix product alone, `[N, V]`; of an aligned head a view, of which `whole` gives the rest."""
        raw_NV = F.linear(hidden_NH, self.weight, self.bias)
        return raw_NV if self.vocabulary is None else raw_NV[..., : self.vocabulary]

    def whole(self, logits_nV: Tensor) -> Tensor:
        """One column for each row of the weight, in its type: what `raw` gave or replaced, with zeros behind it."""
        if self.vocabulary is None:
            return logits_nV.to(self.weight.dtype)
        shape = (logits_nV.shape[0], self.weight.shape[0])
        if logits_nV.stride() == (shape[1], 1) and logits_nV.dtype == self.weight.dtype:
            return logits_nV.as_strided(shape, (shape[1], 1))
        whole_nV = self.weight.new_zeros(shape)
        whole_nV[:, : self.vocabulary] = logits_nV
        return whole_nV

    def refill(self, head: Head) -> None:
        """Take the numbers of the head that this one was cast from, in place: its weights may have changed."""
        for own, new in ((self.weight, head.weight), (self.bias, head.bias)):
            if own is not None and new is not None:
                own[: new.shape[0]] = new

    def plain(self) -> Head:
        """The head without further rows."""
        return self if self.vocabulary is None else self.cut(self.vocabulary)

    def logits(self, hidden_NH: Tensor) -> Tensor:
        """Logits `[N, V]` in float32 (float64 stays)."""
        raw_NV = self.raw(hidden_NH.to(self.weight.dtype))
        return self.rule(raw_NV if raw_NV.dtype == torch.float64 else raw_NV.float())

    def cut(self, vocabulary: int | None) -> Head:
        """The head of the first `vocabulary` ids (None: of all): the only cut of a vocabulary in dpkd."""
        if vocabulary is None or vocabulary == self.weight.shape[0]:
            return self  # the backward of a slice, even of all rows, fills and copies a matrix of the head's size
        return Head(self.weight[:vocabulary], None if self.bias is None else self.bias[:vocabulary], self.rule)

    def cast(self, dtype: torch.dtype) -> Head:
        """The same head in another type, on a GPU aligned."""
        tokens = self.weight.shape[0]
        rows = -(-tokens // ALIGNED) * ALIGNED
        if self.vocabulary is not None or rows == tokens or self.weight.device.type not in ALIGNED_ON:
            bias = None if self.bias is None else self.bias.to(dtype)
            return Head(self.weight.to(dtype), bias, self.rule, self.vocabulary)
        weight = self.weight.new_zeros(rows, self.weight.shape[1], dtype=dtype)
        weight[:tokens] = self.weight
        bias = None if self.bias is None else F.pad(self.bias.to(dtype), (0, rows - tokens))
        return Head(weight, bias, self.rule, tokens)


def causal_lm(model: Any) -> Any:
    """The causal LM inside a peft wrapper, or the model itself."""
    return model.get_base_model() if hasattr(model, "peft_config") else model


def repeated_blocks(model: nn.Module) -> list[nn.Module]:
    """The layers of a model: the list of modules of one class that holds the most weights."""
    lists = [
        list(module)
        for module in causal_lm(model).base_model.modules()
        if isinstance(module, nn.ModuleList) and len({type(one) for one in module}) == 1
    ]
    return max(lists, key=lambda blocks: sum(p.numel() for one in blocks for p in one.parameters()), default=[])


@contextmanager
def evaluating(*models: nn.Module) -> Iterator[None]:
    """Models in eval mode; afterwards every module has the mode it had, whatever happened."""
    modes = [(module, module.training) for model in models for module in model.modules()]
    for model in models:
        model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def logit_rule(config: Any) -> LogitRule:
    """The logit rule that a model's configuration describes (Cohere, Granite, Falcon-H1, Gemma)."""
    text = config.get_text_config()
    scale = float(getattr(text, "logit_scale", None) or 1.0)
    scale *= float(getattr(text, "lm_head_multiplier", None) or 1.0)
    scale /= float(getattr(text, "logits_scaling", None) or 1.0)
    softcap = getattr(text, "final_logit_softcapping", None)
    return LogitRule(scale, None if softcap is None else float(softcap))


def head_of(model: nn.Module, vocabulary: int | None = None) -> Head:
    """The output head of a model, its first `vocabulary` ids."""
    lm = causal_lm(model)
    linear = lm.get_output_embeddings()
    return Head(linear.weight, getattr(linear, "bias", None), logit_rule(lm.config)).cut(vocabulary)


def hidden_states(model: nn.Module, input_ids: Tensor, mask: Any, position_ids: Tensor) -> Tensor:
    """The last hidden states `[R, T, H]`, ready for the head; `mask` as the model's attention takes it."""
    backbone = causal_lm(model).base_model
    # Models with ALiBi take no positions: they count from the attention mask.
    counted = "position_ids" in signature(backbone.forward).parameters

    def run(input_ids: Tensor, mask: Any, position_ids: Tensor) -> Tensor:
        positions = {"position_ids": position_ids} if counted else {}
        output = backbone(input_ids=input_ids, attention_mask=mask, use_cache=False, **positions)
        return output.last_hidden_state  # type: ignore[no-any-return]

    recorded = captured(backbone)
    return run(input_ids, mask, position_ids) if recorded is None else recorded(run, input_ids, mask, position_ids)


def hidden_rows(model: nn.Module, batch: Batch) -> Tensor:
    """The hidden states `[N, H]` from which the response tokens of a batch are predicted."""
    lm = causal_lm(model)
    with attending(lm, batch) as mask:
        hidden = hidden_states(model, batch.input_ids, mask, batch.position_ids)
    return hidden.flatten(0, 1).index_select(0, batch.rows)


@torch.no_grad()
def check_head(model: nn.Module) -> None:
    """Compare head(backbone(x)) with the model's own logits on a probe.

    Raises DpkdError when they differ: the model does something to its logits that dpkd does not know.
    """
    lm = causal_lm(model)
    head = head_of(lm)
    ids = torch.arange(4, 12, device=head.weight.device).remainder(head.weight.shape[0]).unsqueeze(0)
    mask = torch.ones_like(ids)
    positions = torch.arange(ids.shape[1], device=ids.device).unsqueeze(0)
    with evaluating(lm):
        own = lm(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False).logits.float()
        ours = head.logits(hidden_states(lm, ids, mask, positions)).float()
    if not torch.isfinite(own).all():
        raise DpkdError(
            f"the model {type(lm).__name__} gives logits that are not finite on a plain input: check its weights"
        )
    tolerance = 1e-3 if head.weight.dtype in (torch.float32, torch.float64) else 5e-2
    scale = own.abs().max().clamp(min=1.0)
    gap = float((own - ours).abs().max() / scale)
    if gap > tolerance:
        raise DpkdError(
            f"{type(lm).__name__} changes its logits after the output head in a way that dpkd does not know "
            f"(largest relative difference {gap:.2g}). Known are bias, logit_scale, logits_scaling, "
            "lm_head_multiplier and final_logit_softcapping. Please report the model."
        )
