"""Sampling responses: the only code in dpkd that does.

Rows are sampled in a batch that stays full: prompts are taken in order of length, a row leaves the batch and
the cache when it has ended, and a new prompt takes its place. Nothing of that reaches a result: each row has
its own random numbers, and padding changes no value, so a response depends on the prompt, the seed and the
models only.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any, Literal

import torch
from torch import nn

from dpkd.api import Sampled, SamplingSettings
from dpkd.errors import DpkdError
from dpkd.models.compile import uncompiled
from dpkd.models.cuda_graphs import NotStatic
from dpkd.models.head import evaluating
from dpkd.models.loading import longest_sequence
from dpkd.rollout.continuous_batching import ContinuousBatcher, DrawingPolicy, Request
from dpkd.rollout.kv_cache import KVCacheModel
from dpkd.rollout.static_decoding import StaticBatcher

Decoding = Literal["auto", "graph", "eager"]


LOG = logging.getLogger(__name__)
# Largest mean difference in nats between the log-probs of a graph's tokens and of a plain forward over them: by type.
TOLERANCES = {torch.float64: 1e-6, torch.float32: 5e-3, torch.float16: 3e-2, torch.bfloat16: 1e-1}
# So many tokens of so many responses are compared.
COMPARED_TOKENS, COMPARED_RESPONSES = 16, 4


class Decoder:
    """Draws from one model, call after call; static shapes and their CUDA graphs are kept in between.

    `decoding` is `eager` (caches that grow), `graph` (static shapes), or `auto`: `graph` on CUDA if the first responses
    have the log-probs that a plain forward gives them. Where static shapes are impossible or fail, decoding goes on
    eagerly, and a line of the log says why.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        eos_ids: Collection[int],
        pad_id: int,
        vocabulary: int | None = None,
        decoding: Decoding = "auto",
    ) -> None:
        self._model, self._vocabulary, self._pad_id = model, vocabulary, pad_id
        self._device = KVCacheModel(model, vocabulary).device
        self._eos = torch.tensor(sorted(eos_ids), dtype=torch.long, device=self._device)
        self._static = decoding == "graph" or (decoding == "auto" and self._device.type == "cuda")
        self._unchecked = decoding == "auto"
        self._batcher: tuple[nn.Module | None, StaticBatcher] | None = None

    def draw(
        self,
        prompts: Sequence[Sequence[int]],
        settings: SamplingSettings,
        *,
        seeds: Sequence[int],
        mix_with: nn.Module | None = None,
        mix: float = 0.0,
        veto: int = 0,
        num_generations: int = 1,
        longest: int | None = None,
        on_finished: Callable[[int, Sampled], None] | None = None,
    ) -> list[Sampled]:
        """Responses as `sample` gives them."""
        if not 0.0 <= mix <= 1.0:
            raise ValueError(f"a mixture weight lies in [0, 1], got {mix}")
        if mix == 0.0 and veto == 0:
            mix_with = None
        models = [self._model] if mix_with is None else [self._model, mix_with]
        limits = [longest, *(longest_sequence(one) for one in models)]
        longest = min((limit for limit in limits if limit), default=None)
        requests = _requests(prompts, seeds, num_generations, settings, longest)
        results: dict[int, Sampled] = {}
        # no_grad, not inference_mode: models keep tensors (rotary tables, say) that a later backward may save.
        with torch.no_grad(), evaluating(*models), uncompiled(*models):
            for finished in self._run(requests, DrawingPolicy(settings, self._eos, mix, veto), mix_with):
                results.update(finished)
                if on_finished is not None:
                    for place, response in finished.items():
                        on_finished(place, response)
        return [results[place] for place in range(len(seeds))]

    @property
    def bytes(self) -> int:
        """Memory that is kept from one call to the next, without that of the graphs."""
        return 0 if self._batcher is None or (state := self._batcher[1].state) is None else state.bytes

    def release(self) -> None:
        """Give back the memory of caches and graphs."""
        self._batcher = None

    def _run(
        self, requests: Sequence[Request], policy: DrawingPolicy, mix_with: nn.Module | None
    ) -> Iterator[dict[int, Sampled]]:
        models = [KVCacheModel(one, self._vocabulary) for one in (self._model, mix_with) if one is not None]
        known: set[int] = set()
        if self._static and requests:
            try:
                for finished in self._static_batcher(models, mix_with).run(requests, policy):
                    if self._unchecked:
                        self._check(finished, requests)
                    known.update(finished)
                    yield finished
            except DpkdError:
                raise
            except Exception as reason:  # an optimization that fails must not end a run
                LOG.warning("text.decoding: eager, because static shapes do not work here: %s", _first_line(reason))
                self._static, self._batcher = False, None
        left = [part for request in requests for part in _without(request, known)]
        yield from ContinuousBatcher(models, policy, self._pad_id).run(left)

    def _static_batcher(self, models: Sequence[KVCacheModel], mix_with: nn.Module | None) -> StaticBatcher:
        """The one of the last call, if it was for the same models."""
        if self._batcher is None or self._batcher[0] is not mix_with:
            self._batcher = mix_with, StaticBatcher(models, self._pad_id)
        return self._batcher[1]

    def _check(self, finished: dict[int, Sampled], requests: Sequence[Request]) -> None:
        """Compare the first responses with a forward over them. Raises NotStatic when they differ."""
        prompts = {request.first_row + i: request.prompt for request in requests for i in range(len(request.seeds))}
        model, difference, tokens = KVCacheModel(self._model, self._vocabulary), 0.0, 0
        for number, response in list(finished.items())[:COMPARED_RESPONSES]:
            ids = response.response_ids[:COMPARED_TOKENS]
            logps = model.logps(prompts[number], ids)
            difference += float((logps - response.logps[: len(ids)]).abs().sum())
            tokens += len(ids)
        tolerance = TOLERANCES.get(model.dtype, TOLERANCES[torch.bfloat16])
        if not difference <= tolerance * tokens:
            raise NotStatic(
                f"its log-probs differ from a plain forward's by {difference / tokens:.2g} nats a token, and "
                f"{tolerance:.2g} are expected of {str(model.dtype).removeprefix('torch.')}"
            )
        self._unchecked = False


def sample(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    settings: SamplingSettings,
    *,
    eos_ids: Collection[int],
    pad_id: int,
    seeds: Sequence[int],
    vocabulary: int | None = None,
    decoding: Decoding = "auto",
    **more: Any,
) -> list[Sampled]:
    """`num_generations` responses to each prompt, in the order of `prompts`, those to one prompt together.

    `seeds` has one non-negative number per response, in that order. Only ids below `vocabulary` are drawn;
    log-probs are normalized over these. With `mix_with`, each token is drawn from
    `mix · mix_with + (1 - mix) · model`; with a `veto` from `model`, and again from `mix_with` where it is not among
    the `veto` tokens that this finds likeliest. A response ends at EOS, after `max_new_tokens`, or where prompt and
    response fill the model, or have `longest` tokens together. At most `settings.batch_size` responses are
    written at a time. `decoding` as in `Decoder`, whose `draw` takes `more`.

    `on_finished` gets each response with its place in the result, as soon as it is known.

    Raises DpkdError when a prompt is empty or leaves no room for a response, when two vocabularies differ, or
    when the model's logits are not numbers.
    """
    decoder = Decoder(model, eos_ids=eos_ids, pad_id=pad_id, vocabulary=vocabulary, decoding=decoding)
    return decoder.draw(prompts, settings, seeds=seeds, **more)


def _first_line(reason: Exception) -> str:
    return (str(reason).splitlines() or [type(reason).__name__])[0]


def _without(request: Request, known: set[int]) -> Iterator[Request]:
    """A request without the responses that are known: whole, or one part for each response that is not."""
    places = range(len(request.seeds))
    if not any(request.first_row + i in known for i in places):
        yield request
        return
    for i in places:
        if request.first_row + i not in known:
            yield Request(request.first_row + i, request.prompt, request.seeds[i : i + 1], request.limit)


def _requests(
    prompts: Sequence[Sequence[int]],
    seeds: Sequence[int],
    num_generations: int,
    settings: SamplingSettings,
    longest: int | None,
) -> list[Request]:
    """Prompts with their seeds; one with more seeds than fit into a batch becomes several."""
    if len(seeds) != len(prompts) * num_generations:
        raise ValueError(f"{len(prompts)} prompts x {num_generations} responses need as many seeds, got {len(seeds)}")
    requests = []
    for number, prompt in enumerate(prompts):
        limit = room(number, len(prompt), longest, settings.max_new_tokens)
        last = (number + 1) * num_generations
        for first in range(number * num_generations, last, settings.batch_size):
            own_seeds = tuple(seeds[first : min(last, first + settings.batch_size)])
            requests.append(Request(first, tuple(prompt), own_seeds, limit))
    return requests


def room(number: int, prompt_tokens: int, longest: int | None, max_new_tokens: int) -> int:
    """The largest number of tokens of a response to the prompt of a number. Raises DpkdError when there is no room."""
    if prompt_tokens == 0:
        raise DpkdError(f"prompt {number} has no tokens: a model needs at least one (BOS, say) to begin with")
    if longest is None:
        return max_new_tokens
    if prompt_tokens >= longest:
        raise DpkdError(
            f"prompt {number} has {prompt_tokens} tokens, and the model reads at most {longest}: there is no "
            "room for a response. A lower data.max_prompt_tokens drops and counts longer prompts."
        )
    return min(max_new_tokens, longest - prompt_tokens)
