"""Sampling responses: the only code in dpkd that does.

Rows are sampled in a batch that stays full: prompts are taken in order of length, a row leaves the batch and
the cache when it has ended, and a new prompt takes its place. Nothing of that reaches a result: each row has
its own random numbers, and padding changes no value, so a response depends on the prompt, the seed and the
models only.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

import torch
from torch import nn

from dpkd.api import Sampled
from dpkd.errors import DpkdError
from dpkd.rollout.base import SamplingSettings
from dpkd.rollout.continuous_batching import ContinuousBatcher, Request
from dpkd.rollout.kv_cache import KVCacheModel, evaluating, longest_sequence


def sample(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    settings: SamplingSettings,
    *,
    eos_ids: Collection[int],
    pad_id: int,
    seeds: Sequence[int],
    vocabulary: int | None = None,
    mix_with: nn.Module | None = None,
    mix: float = 0.0,
    veto: int = 0,
    progress: Callable[[int], None] | None = None,
    num_generations: int = 1,
    longest: int | None = None,
    on_finished: Callable[[int, Sampled], None] | None = None,
) -> list[Sampled]:
    """`num_generations` responses to each prompt, in the order of `prompts`, those to one prompt together.

    `seeds` has one non-negative number per response, in that order. Only ids below `vocabulary` are drawn;
    log-probs are normalized over these. With `mix_with`, each token is drawn from
    `mix · mix_with + (1 - mix) · model`; with a `veto` from `model`, and again from `mix_with` where it is not among
    the `veto` tokens that this finds likeliest. A response ends at EOS, after `max_new_tokens`, or where prompt and
    response fill the model, or have `longest` tokens together. At most `settings.batch_size` responses are
    written at a time.

    `progress` gets the number of responses finished since its last call; `on_finished` each response with its
    place in the result, as soon as it is known.

    Raises DpkdError when a prompt is empty or leaves no room for a response, when two vocabularies differ, or
    when the model's logits are not numbers.
    """
    if not 0.0 <= mix <= 1.0:
        raise ValueError(f"a mixture weight lies in [0, 1], got {mix}")
    models = [model] if mix_with is None or (mix == 0.0 and veto == 0) else [model, mix_with]
    limits = [longest, *(longest_sequence(one) for one in models)]
    longest = min((limit for limit in limits if limit), default=None)
    requests = _requests(prompts, seeds, num_generations, settings, longest)
    batcher = ContinuousBatcher([KVCacheModel(one, vocabulary) for one in models], settings, eos_ids, pad_id, mix, veto)
    results: dict[int, Sampled] = {}
    # no_grad, not inference_mode: models keep tensors (rotary tables, say) that a later backward may save.
    with torch.no_grad(), evaluating(*models):
        for finished in batcher.run(requests):
            results.update(finished)
            if progress is not None:
                progress(len(finished))
            if on_finished is not None:
                for place, response in finished.items():
                    on_finished(place, response)
    return [results[place] for place in range(len(seeds))]


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
