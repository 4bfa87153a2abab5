"""A teacher on a server: it scores the student's and the data set's text over HTTP, and writes its own."""

from __future__ import annotations

import math
import time
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dpkd.api import TeacherAccess, Text
from dpkd.api.teachers import Teacher, TeacherBatch, TeacherOffer, TeacherText, Wants
from dpkd.errors import DpkdError
from dpkd.models.settings import TeacherSettings
from dpkd.teachers.server.client import Client
from dpkd.teachers.server.protocols import PROTOCOLS, BadAnswer, Query, ServedScores
from dpkd.teachers.server.self_test import self_test, served_model
from dpkd.teachers.server.text import ServerSampler
from dpkd.teachers.store import StoredRows

# Below this the mass of the rest is rounding of the server's float32.
LEAST_REST = 1e-9
# As many tokens at a position as a loss may want: whether the server gives them, its self-test finds out.
MOST = 10**9


def served_offer(settings: TeacherSettings) -> TeacherOffer:
    """What a server of a protocol gives, if it was started for it."""
    access = PROTOCOLS[settings.protocol].offers
    if settings.top_k == -1 and access is not TeacherAccess.TEXT:
        access = TeacherAccess.LOGITS
    asked = MOST if settings.top_k is None else settings.top_k
    has = "log-probs of a few tokens at each position" if settings.top_k is None else f"teacher.top_k={asked} of them"
    return TeacherOffer(access, k=asked, what="the server", has=has, more=_more)


def _more(what: TeacherAccess | Text, k: int | None = None) -> str:
    """How to get more of a server."""
    if what is TeacherAccess.TOP_K:
        return f"teacher.top_k={k}"
    if what is TeacherAccess.LOGITS:
        return "a loss of `dpkd list-losses --offers chosen-ids` or, with a small vocabulary, teacher.top_k=-1"
    return ""


class ServerTeacher(Teacher):
    """What a server says, in the place of a model. Nothing is asked twice while its answer is kept."""

    measurable = False
    remote = True

    def __init__(self, settings: TeacherSettings) -> None:
        self._settings = settings
        self.k, self.chosen = settings.top_k or 0, 0
        self.client = Client(settings.servers, settings.client)
        self.protocol = PROTOCOLS[settings.protocol](settings.model or "")
        self._pending: dict[Query, Future[ServedScores]] = {}
        self._answers: OrderedDict[Query, ServedScores] = OrderedDict()
        self._kept = 0
        self._device = torch.device("cpu")
        self._restart()

    @property
    def offers(self) -> TeacherAccess:  # type: ignore[override]
        """What the protocol gives; whether this server was started for it, `check` finds out."""
        return TeacherAccess.LOGITS if self.k == -1 else self.protocol.offers

    def describe(self) -> str:
        what = f"{self.protocol.model or 'the model'} at {', '.join(self.client.urls)} ({self._settings.protocol})"
        asked = [
            *([f"the {self.k} likeliest tokens"] if self.k > 0 else []),
            *(["the whole distribution"] if self.k == -1 else []),
            *([f"{self.chosen} ids of the student's choice"] if self.chosen else []),
        ]
        reads = f", context length {self.context:,}" if self.context else ""
        return f"{what}, asked for {' and '.join(asked) or 'no distribution'}{reads}"

    def fingerprint(self) -> str:
        return f"server:{self._settings.protocol}:{self.protocol.model}"

    def prepare_for(self, kept: int, chosen: int) -> None:
        self.k = kept if self._settings.top_k is None else self._settings.top_k
        self.chosen = 0 if self.k == -1 else chosen  # the whole distribution has them
        self.chooses = self.chosen > 0

    def check(self, tokenizer: Any) -> None:
        """Ask the server who it is and test it on a known text: nothing of it is trusted before."""
        try:
            self._check(tokenizer)
        finally:
            self.client.close()  # until it is needed again: a plan holds nothing open

    def _check(self, tokenizer: Any) -> None:
        name, context = served_model(self.client, self.protocol)
        self.protocol = type(self.protocol)(name)
        self.context = None if context is None else context - 1  # one token is always drawn
        self._tokenizer = tokenizer
        # What a server's head has beyond these ids is unknown, and one id too many can kill it. The mass that it gives
        # to them counts as that of the rest.
        self.vocabulary = max(tokenizer.get_vocab().values()) + 1
        if self.protocol.offers is not TeacherAccess.TEXT:
            self_test(self.client, self.protocol, tokenizer, k=self.k, chosen=self.chosen)

    def load(self, device: torch.device, dtype: torch.dtype | None = None) -> None:
        self._device = device

    def expect(self, sequences: Sequence[tuple[Sequence[int], Sequence[int]]], wants: Wants) -> None:
        if wants.chosen is None and self.protocol.offers is not TeacherAccess.TEXT:
            for query in self._queries(sequences, [len(r) - (not p) for p, r in sequences], wants):
                self._ask(query)

    def score(self, batch: TeacherBatch, wants: Wants) -> StoredRows:
        """What the server says of each response position; raises TeacherLost when it is gone."""
        queries = self._queries(batch.sequences, batch.lengths.tolist(), wants)
        for query in queries:
            self._ask(query)
        scores = [self._answer(query) for query in queries]
        return served_rows(scores, batch.targets.to(self._device), wants, self.vocabulary)

    def text(self) -> TeacherText:
        """The server writes its own responses."""
        return TeacherText(None, self.vocabulary, self.fingerprint(), sampler=self.sampler)

    def sampler(self) -> ServerSampler:
        """What draws by the server."""
        return ServerSampler(self.client, self.protocol, self._tokenizer, self.vocabulary, self.context)

    def statistics(self) -> Mapping[str, float]:
        """Tokens that servers scored a second, seconds that the run waited for answers, attempts that failed."""
        seconds = max(time.monotonic() - self._since, 1e-9)
        found = {
            "teacher/tokens_per_second": self._tokens / seconds,
            "teacher/waited": self._waited,
            "teacher/retries": float(self.client.retried),
        }
        self._restart()
        return found

    def close(self) -> None:
        self.client.close()
        self._pending.clear()

    def _restart(self) -> None:
        self._since, self._waited, self._tokens, self.client.retried = time.monotonic(), 0.0, 0, 0

    def _queries(
        self, sequences: Sequence[tuple[Sequence[int], Sequence[int]]], rows: Sequence[int], wants: Wants
    ) -> list[Query]:
        chosen = [None] * len(rows) if wants.chosen is None else wants.chosen.split(list(rows))
        queries = []
        for (prompt, response), count, own in zip(sequences, rows, chosen, strict=True):
            ids = (*prompt, *response)
            odd = [i for i in ids if not 0 <= i < self.vocabulary]
            if odd:
                raise DpkdError(
                    f"the id {odd[0]} is not one of the {self.vocabulary:,} that the teacher's tokenizer has: it was "
                    "not sent to the server, which may die of it"
                )
            if count:
                listed = None if own is None else tuple(map(tuple, own.tolist()))
                queries.append(Query(ids, count, self.k if wants.logits and listed is None else 0, listed))
        return queries

    def _ask(self, query: Query) -> None:
        if query not in self._answers and query not in self._pending:
            self._pending[query] = self.client.run(self._scored(query))

    async def _scored(self, query: Query) -> ServedScores:
        path, body = self.protocol.request(query)
        answer = await self.client.send("POST", path, body)
        return self.protocol.scores(query, answer)

    def _answer(self, query: Query) -> ServedScores:
        if query in self._answers:
            self._answers.move_to_end(query)
            return self._answers[query]
        began = time.monotonic()
        future = self._pending.pop(query, None) or self.client.run(self._scored(query))
        try:
            scores = future.result()
        except BadAnswer as error:
            raise BadAnswer(f"the teacher's server {' and '.join(self.client.urls)}: {error}") from error
        self._waited += time.monotonic() - began
        self._tokens += query.rows
        self._keep(query, scores)
        return scores

    def _keep(self, query: Query, scores: ServedScores) -> None:
        """Keep an answer; those that were not used for longest go first."""
        if query.chosen is not None:  # the student's choice will be another one
            return
        self._answers[query] = scores
        self._kept += query.rows
        while self._kept > self._settings.client.cache_tokens:
            oldest, _ = self._answers.popitem(last=False)
            self._kept -= oldest.rows


def served_rows(scores: Sequence[ServedScores], targets: Tensor, wants: Wants, vocabulary: int) -> StoredRows:
    """The answers to the sequences of a batch as the rows of that batch: given tokens, some others, and the rest.

    The given token stands beside the others, and so may be in a row twice; ids beyond the vocabulary, which a padded
    head has, are replaced by it.
    """
    device = targets.device

    def joined(parts: list[np.ndarray], like: torch.dtype) -> Tensor:
        return torch.from_numpy(np.concatenate(parts)).to(device, like) if parts else torch.empty(0, device=device)

    given = joined([one.given for one in scores], torch.float64)
    width = scores[0].ids.shape[1] if scores else 0  # a process may have no sequence of a step
    ids = joined([one.ids for one in scores], torch.int64).reshape(len(given), width).long()
    logps = joined([one.logps for one in scores], torch.float64).reshape(len(given), width)
    targets = targets.long()
    beyond = ids >= vocabulary
    ids = torch.cat([torch.where(beyond, targets.unsqueeze(1), ids), targets.unsqueeze(1)], 1)
    logps = torch.cat([torch.where(beyond, given.unsqueeze(1), logps), given.unsqueeze(1)], 1)
    ids, order = ids.sort(dim=1, stable=True)
    logps = logps.gather(1, order)
    repeated = torch.zeros_like(ids, dtype=torch.bool)
    repeated[:, 1:] = ids[:, 1:] == ids[:, :-1]
    others = vocabulary - (~repeated).sum(1)
    mass = logps.exp().masked_fill(repeated, 0.0).sum(1)
    rest = torch.where(others > 0, (1 - mass).clamp(min=LEAST_REST).log(), -math.inf)
    return StoredRows(
        given.float(),
        ids,
        logps.float(),
        rest.float(),
        targets=targets,
        wants=wants,
        vocabulary=vocabulary,
        others=others.float(),
    )
