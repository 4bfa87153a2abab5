"""What servers are asked and what they answer: bodies of requests, and their answers checked number by number.

vLLM    POST /v1/completions with `prompt_logprobs` (run against 0.30); ids of the caller's choice by POST
        /inference/v1/generate with `prompt_logprob_token_ids` (0.33, from its documentation)
SGLang  POST /generate with `return_logprob` (0.5, from its documentation)
openai  POST /v1/completions: text only
Shapes: T tokens of a sequence that are scored (its last ones), K tokens of a position.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from dpkd.api import TeacherAccess
from dpkd.errors import DpkdError

# How vLLM writes -inf in JSON.
EXCLUDED = -9999.0
# More than rounding of a server in a small type can put above a probability of 1.
ABOVE_ZERO = 1e-2


class BadAnswer(DpkdError):
    """A server answered, and its numbers cannot be used."""


class Query(NamedTuple):
    """A sequence whose last `rows` tokens are to be scored.

    k       likeliest tokens that are asked for beside the given one; -1: all of the vocabulary
    chosen  `[T][K]` ids to be scored at each position, in place of the likeliest
    """

    ids: tuple[int, ...]
    rows: int
    k: int = 0
    chosen: tuple[tuple[int, ...], ...] | None = None


class ServedScores(NamedTuple):
    """Log-probs in nats: of the given tokens `[T]`, and of the tokens `ids` `[T, K]` of each position `[T, K]`."""

    given: np.ndarray
    ids: np.ndarray
    logps: np.ndarray


class ServedText(NamedTuple):
    """A text by the server; `ids` where it says them, `ended` where it ended by itself, and not at the limit."""

    text: str
    ids: tuple[int, ...] | None
    ended: bool
    logps: tuple[float, ...] = ()


@dataclass(frozen=True)
class Protocol:
    """Any server with OpenAI's completions. Subclasses say how theirs is asked for numbers."""

    model: str
    offers: TeacherAccess = TeacherAccess.TEXT

    def start_command(self, k: int, chosen: bool) -> str:
        """How to start a server that can do what is needed."""
        return f"a server of {self.model}"

    def request(self, query: Query) -> tuple[str, dict[str, Any]]:
        """Path and body that ask for the scores of a sequence."""
        raise NotImplementedError

    def scores(self, query: Query, answer: Any) -> ServedScores:
        """The scores in an answer. Raises BadAnswer, naming what is wrong with it."""
        raise NotImplementedError

    def texts(self, answer: Any) -> Sequence[tuple[int, str]]:
        """Ids and texts of tokens that an answer to `request` names: what they mean to the server."""
        return []

    def text_request(self, prompt: str, ids: Sequence[int], sampling: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
        """Path and body that ask for a text; `sampling` in OpenAI's words."""
        foreign = ("top_k", "stop_token_ids", "ignore_eos")  # OpenAI's interface has no such settings
        own = {name: value for name, value in sampling.items() if name not in foreign}
        return "/v1/completions", {"model": self.model, "prompt": prompt, **own}

    def text(self, answer: Any) -> ServedText:
        """The text in an answer. Raises BadAnswer where there is none."""
        try:
            (choice,) = answer["choices"]
            return ServedText(str(choice["text"]), None, choice.get("finish_reason") == "stop")
        except (KeyError, TypeError, ValueError) as error:
            raise BadAnswer(f"the server's answer has no text: {_shown(answer)}") from error


@dataclass(frozen=True)
class VLLM(Protocol):
    """vLLM's OpenAI-compatible server."""

    offers: TeacherAccess = TeacherAccess.CHOSEN_IDS

    def start_command(self, k: int, chosen: bool) -> str:
        flags = f" --max-logprobs {k}" if k > 20 or k == -1 else ""
        if chosen:
            return f"VLLM_USE_V2_MODEL_RUNNER=1 vllm serve {self.model}{flags} --enable-scale-out  (vLLM 0.33 or newer)"
        return f"vllm serve {self.model}{flags}"

    def request(self, query: Query) -> tuple[str, dict[str, Any]]:
        if query.chosen is not None:
            # The token itself comes as the last of each row's ids.
            given = query.ids[-query.rows :]
            rows = [[*row, token] for row, token in zip(query.chosen, given, strict=True)]
            sampling = {
                "max_tokens": 1,
                "prompt_logprob_token_ids": rows,
                "prompt_logprob_start": len(query.ids) - query.rows - 1,
            }
            return "/inference/v1/generate", {
                "model": self.model,
                "token_ids": list(query.ids),
                "sampling_params": sampling,
            }
        return "/v1/completions", {
            "model": self.model,
            "prompt": list(query.ids),
            "max_tokens": 1,
            "temperature": 0.0,
            "prompt_logprobs": query.k,
        }

    def scores(self, query: Query, answer: Any) -> ServedScores:
        if query.chosen is not None:
            return self._chosen(query, answer)
        entries = _at(answer, "choices", 0, "prompt_logprobs")
        if not isinstance(entries, list) or len(entries) != len(query.ids):
            raise BadAnswer(f"expected log-probs of {len(query.ids)} tokens, got {_count(entries)}: {_shown(answer)}")
        first = len(query.ids) - query.rows
        return _listed(query, [_vllm_row(entries[place], place) for place in range(first, len(query.ids))])

    def texts(self, answer: Any) -> Sequence[tuple[int, str]]:
        entries = _at(answer, "choices", 0, "prompt_logprobs")
        tokens = [(int(i), one.get("decoded_token")) for entry in entries if entry for i, one in entry.items()]
        return [(i, text) for i, text in tokens if isinstance(text, str)]

    def text_request(self, prompt: str, ids: Sequence[int], sampling: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
        body = {"model": self.model, "prompt": list(ids), **sampling, "logprobs": 0, "return_tokens_as_token_ids": True}
        return "/v1/completions", {**body, "add_special_tokens": False, "skip_special_tokens": False}

    def text(self, answer: Any) -> ServedText:
        drawn = super().text(answer)
        logprobs = answer["choices"][0].get("logprobs") or {}
        tokens = logprobs.get("tokens") or []
        if not all(isinstance(token, str) and token.startswith("token_id:") for token in tokens):
            return drawn
        ids = tuple(int(token.removeprefix("token_id:")) for token in tokens)
        return drawn._replace(ids=ids, logps=tuple(logprobs.get("token_logprobs") or ()))

    def _chosen(self, query: Query, answer: Any) -> ServedScores:
        assert query.chosen is not None
        packed = _at(answer, "prompt_token_id_logprobs")
        try:
            values = np.load(io.BytesIO(base64.b64decode(packed, validate=True)), allow_pickle=False)
        except (TypeError, ValueError) as error:
            raise BadAnswer(f"the log-probs of chosen ids are no base64 of a .npy array: {_shown(packed)}") from error
        wanted = (query.rows, len(query.chosen[0]) + 1)
        if values.shape != wanted:
            raise BadAnswer(f"expected log-probs of chosen ids of shape {wanted}, got {values.shape}")
        values = values.astype(np.float64)
        _check(values)
        return ServedScores(values[:, -1], np.array(query.chosen, dtype=np.int64), values[:, :-1])


@dataclass(frozen=True)
class SGLang(Protocol):
    """SGLang's own interface; written from its documentation, never run in this project."""

    offers: TeacherAccess = TeacherAccess.CHOSEN_IDS

    def start_command(self, k: int, chosen: bool) -> str:
        return f"python -m sglang.launch_server --model-path {self.model}"

    def request(self, query: Query) -> tuple[str, dict[str, Any]]:
        body: dict[str, Any] = {
            "input_ids": list(query.ids),
            "sampling_params": {"max_new_tokens": 1, "temperature": 0.0},
            "return_logprob": True,
            "return_text_in_logprobs": True,
            # Positions are those of the token that is predicted; the first of the list has no log-prob.
            "logprob_start_len": len(query.ids) - query.rows - 1,
        }
        if query.chosen is not None:
            # One list for all positions.
            body["token_ids_logprob"] = sorted({i for row in query.chosen for i in row})
        elif query.k:
            body["top_logprobs_num"] = query.k
        return "/generate", body

    def scores(self, query: Query, answer: Any) -> ServedScores:
        meta = _at(answer, "meta_info")
        given = _tail(meta, "input_token_logprobs", query.rows)
        name = "input_top_logprobs" if query.chosen is None else "input_token_ids_logprobs"
        beside = _tail(meta, name, query.rows) if query.k or query.chosen is not None else [[]] * query.rows
        rows = []
        for place, (own, others) in enumerate(zip(given, beside, strict=True)):
            found = {_int(one, place): _number(one[0]) for one in others or []}
            rows.append({**found, _int(own, place): _number(own[0])})
        if query.chosen is None:
            return _listed(query, rows)
        try:
            values = [[row[i] for i in ids] for row, ids in zip(rows, query.chosen, strict=True)]
            own_logps = [row[i] for row, i in zip(rows, query.ids[-query.rows :], strict=True)]
        except KeyError as error:
            raise BadAnswer(f"the answer has no log-prob of the id {error}, which was asked for") from error
        scores = ServedScores(np.array(own_logps), np.array(query.chosen, dtype=np.int64), np.array(values))
        _check(scores.given)
        _check(scores.logps)
        return scores

    def texts(self, answer: Any) -> Sequence[tuple[int, str]]:
        rows = _at(answer, "meta_info", "input_token_logprobs")
        return [(one[1], one[2]) for one in rows if len(one) > 2 and one[0] is not None and isinstance(one[2], str)]

    def text_request(self, prompt: str, ids: Sequence[int], sampling: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
        wanted = {"max_new_tokens" if k == "max_tokens" else k: v for k, v in sampling.items()}
        wanted = {"sampling_seed" if k == "seed" else k: v for k, v in wanted.items()}
        return "/generate", {"input_ids": list(ids), "sampling_params": wanted, "return_logprob": True}

    def text(self, answer: Any) -> ServedText:
        meta = _at(answer, "meta_info")
        tokens = meta.get("output_token_logprobs") or []
        reason = meta.get("finish_reason")
        ended = (reason.get("type") if isinstance(reason, dict) else reason) == "stop"
        ids = tuple(_int(one, place) for place, one in enumerate(tokens))
        return ServedText(str(_at(answer, "text")), ids or None, ended, tuple(_number(one[0]) for one in tokens))


PROTOCOLS: Mapping[str, type[Protocol]] = {"vllm": VLLM, "sglang": SGLang, "openai": Protocol}


def _vllm_row(entry: Any, place: int) -> dict[int, float]:
    if not isinstance(entry, dict) or not entry:
        raise BadAnswer(f"the log-probs of token {place} are missing: {_shown(entry)}")
    try:
        return {int(i): _number(one["logprob"]) for i, one in entry.items()}
    except (KeyError, TypeError, ValueError) as error:
        raise BadAnswer(f"the log-probs of token {place} cannot be read: {_shown(entry)}") from error


def _listed(query: Query, rows: Sequence[Mapping[int, float]]) -> ServedScores:
    """ServedScores from log-probs by id. Raises BadAnswer where the given token, or one of the K, is missing."""
    given, ids, logps = [], [], []
    width = min((len(row) for row in rows), default=0) if query.k == -1 else query.k
    for token, row in zip(query.ids[-query.rows :] if query.rows else (), rows, strict=True):
        if token not in row:
            raise BadAnswer(
                f"the log-prob of the given token {token} is missing, the answer has those of {_shown(list(row))}: its "
                "positions are shifted, or it is for another text"
            )
        if len(row) < width:
            raise BadAnswer(f"expected log-probs of {width} tokens at each position, got {len(row)}")
        best = sorted(row.items(), key=lambda item: (-item[1], item[0]))[:width]
        given.append(row[token])
        ids.append([i for i, _ in best])
        logps.append([value for _, value in best])
    scores = ServedScores(
        np.array(given, dtype=np.float64),
        np.array(ids, dtype=np.int64).reshape(len(rows), width),
        np.array(logps, dtype=np.float64).reshape(len(rows), width),
    )
    _check(scores.given)
    _check(scores.logps)
    return scores


def _check(values: np.ndarray) -> None:
    """Raises BadAnswer for what is no log-probability."""
    for name, wrong in (
        ("NaN", np.isnan(values)),
        ("-9999 or -inf (a token that the server excludes)", values <= EXCLUDED),
        ("above 0, so it is no log-prob (started with --logprobs-mode raw_logits?)", values > ABOVE_ZERO),
    ):
        if wrong.any():
            raise BadAnswer(f"{int(wrong.sum())} of {values.size} log-probs are {name}")


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise BadAnswer(f"expected a log-prob, got {_shown(value)}")
    return float(value) if not math.isinf(value) else EXCLUDED


def _int(entry: Any, place: int) -> int:
    if not isinstance(entry, list | tuple) or len(entry) < 2 or not isinstance(entry[1], int):
        raise BadAnswer(f"the log-probs of token {place} cannot be read: {_shown(entry)}")
    return entry[1]


def _tail(meta: Any, name: str, rows: int) -> list[Any]:
    """The last entries of a list of SGLang's: what comes before has no log-prob."""
    entries = meta.get(name) if isinstance(meta, dict) else None
    if not isinstance(entries, list) or len(entries) < rows:
        raise BadAnswer(f"expected {rows} entries of {name}, got {_count(entries)}")
    return entries[len(entries) - rows :]


def _at(answer: Any, *path: str | int) -> Any:
    """What an answer has at a path. Raises BadAnswer where it has nothing there."""
    found = answer
    for key in path:
        try:
            found = found[key]
        except (KeyError, IndexError, TypeError) as error:
            raise BadAnswer(f"the answer has no {'.'.join(map(str, path))}: {_shown(answer)}") from error
    if found is None:
        raise BadAnswer(f"the answer has no {'.'.join(map(str, path))}: {_shown(answer)}")
    return found


def _count(entries: Any) -> str:
    return f"{len(entries)}" if isinstance(entries, list) else "none"


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 120 else f"{text[:117]}..."
