"""Text by a server: a sampler that sends prompts and gets responses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from dpkd.api import Sampled, SamplingTask
from dpkd.data.encoding import encode_continuations, end_ids
from dpkd.errors import DpkdError
from dpkd.teachers.server.client import Client
from dpkd.teachers.server.protocols import BadAnswer, Protocol, ServedText


class ServerSampler:
    """Draws by a server. Where it says no ids, its text is encoded by the tokenizer."""

    def __init__(
        self, client: Client, protocol: Protocol, tokenizer: Any, vocabulary: int, context: int | None
    ) -> None:
        self._client, self._protocol, self._tokenizer = client, protocol, tokenizer
        self._vocabulary, self._context = vocabulary, context
        self._eos_ids = end_ids(tokenizer, None)

    def refresh(self) -> None:
        """A server keeps its weights."""

    def draw(self, task: SamplingTask, on_finished: Callable[[int, Sampled], None] | None = None) -> list[Sampled]:
        """A response per seed, in their order, all requested at once. Raises TeacherLost when the server is gone."""
        if task.mix_with is not None:
            raise DpkdError("a server cannot mix its distribution with another model's")
        waiting = []
        for place, seed in enumerate(task.seeds):
            ids = list(task.prompts[place // task.num_generations])
            prompt = self._tokenizer.decode(ids, skip_special_tokens=False)
            path, body = self._protocol.text_request(prompt, ids, self._sampling(task, seed, len(ids)))
            waiting.append(self._client.post(path, body))
        drawn = []
        for place, future in enumerate(waiting):
            drawn.append(self._sampled(self._protocol.text(future.result())))
            if on_finished is not None:
                on_finished(place, drawn[-1])
        return drawn

    def close(self) -> None:
        """The client is the teacher's."""

    def _sampling(self, task: SamplingTask, seed: int, prompt_tokens: int) -> dict[str, Any]:
        room = task.max_new_tokens if self._context is None else self._context - prompt_tokens
        sampling: dict[str, Any] = {
            "max_tokens": max(1, min(task.max_new_tokens, room)),
            "temperature": task.temperature,
            "seed": seed % 2**31,
            "stop_token_ids": sorted(i for i in self._eos_ids if i < self._vocabulary),
        }
        sampling |= {"top_p": task.top_p} if task.top_p < 1 else {}
        return sampling | ({"top_k": task.top_k} if task.top_k > 0 else {})

    def _sampled(self, drawn: ServedText) -> Sampled:
        ids = drawn.ids
        if ids is None:
            ids = tuple(encode_continuations(self._tokenizer, [drawn.text])[0])
        if drawn.ended and (not ids or ids[-1] not in self._eos_ids):
            ids = (*ids, self._tokenizer.eos_token_id)
        if any(not 0 <= i < self._vocabulary for i in ids):
            raise BadAnswer(f"the server drew an id that the tokenizer does not have: {max(ids)}")
        nothing = torch.empty(0)
        return Sampled(tuple(ids), nothing, nothing, not ids or ids[-1] not in self._eos_ids)
