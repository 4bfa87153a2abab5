"""What is found out about a server before anything is trained on its numbers: its model, tokenizer and positions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dpkd.errors import DpkdError
from dpkd.teachers.server.client import Client, ServerRefusal
from dpkd.teachers.server.protocols import BadAnswer, Protocol, Query, ServedScores

TEXT = "The quick brown fox jumps over 13 lazy dogs."
TOKENS = 24
# Log-probs of one token in two requests differ by less, even where a server works in bfloat16.
CLOSE = 0.3
WITHOUT_CHOICE = (
    "Without such a server: teacher.top_k=-1 where the vocabulary is small, or --loss opd, which reads the drawn token "
    "alone."
)


def served_model(client: Client, protocol: Protocol) -> tuple[str, int | None]:
    """Name and context length (None: not said) of the model that all servers have.

    Raises DpkdError where one does not answer, or has another one.
    """
    wanted, contexts = protocol.model, []
    for url in client.urls:
        listed = client.get("/v1/models", server=url).result()
        models = [m for m in (listed.get("data") if isinstance(listed, dict) else None) or [] if isinstance(m, dict)]
        names = [str(model.get("id")) for model in models]
        if not wanted and len(names) == 1:
            wanted = names[0]
        if wanted not in names:
            has = ", ".join(names) or "no model"
            asked = f"not {wanted}" if wanted else "and none is chosen"
            raise DpkdError(f"teacher.model: the server {url} has {has}, {asked}: set teacher.model to the right name")
        contexts.append(models[names.index(wanted)].get("max_model_len"))
    known = [context for context in contexts if isinstance(context, int)]
    return wanted, min(known, default=None)


def self_test(client: Client, protocol: Protocol, tokenizer: Any, *, k: int, chosen: int) -> None:
    """Score a known text on every server. Raises DpkdError when answers are not what they are taken for.

    Finds too small a limit of log-probs, another tokenizer, shifted positions, and servers that differ.
    """
    ids = tuple(tokenizer(TEXT, add_special_tokens=False)["input_ids"][:TOKENS])
    found = [_tested(client, url, protocol, tokenizer, ids, k, chosen) for url in client.urls]
    for url, scores in zip(client.urls[1:], found[1:], strict=True):
        apart = float(abs(scores.given - found[0].given).max())
        if apart > CLOSE:
            raise DpkdError(
                f"teacher.server: the log-probs of {url} differ from those of {client.urls[0]} by up to {apart:.2g} "
                "nats: they do not serve the same model"
            )


def _tested(
    client: Client, url: str, protocol: Protocol, tokenizer: Any, ids: tuple[int, ...], k: int, chosen: int
) -> ServedScores:
    def score(query: Query) -> tuple[Any, ServedScores]:
        path, body = protocol.request(query)
        try:
            answer = client.post(path, body, server=url).result()
            return answer, protocol.scores(query, answer)
        except ServerRefusal as error:
            asked = f"{chosen} chosen ids" if query.chosen is not None else f"{query.k} log-probs a position"
            if error.status in (400, 404, 405, 422):
                raise DpkdError(
                    f"the losses of this run need {asked} of the teacher, and its server refuses. {error}\n"
                    f"Start it with: {protocol.start_command(max(k, chosen + 1), query.chosen is not None)}"
                    + (f"\n{WITHOUT_CHOICE}" if query.chosen is not None else "")
                ) from error
            raise
        except BadAnswer as error:
            raise DpkdError(f"the server {url} fails the self-test: {error}") from error

    answer, scores = score(Query(ids, len(ids) - 1, k))
    _same_tokens(url, tokenizer, protocol.texts(answer))
    _same_positions(url, score, protocol, client, ids, scores)
    if chosen:
        rows = tuple(tuple(ids[(place + i) % len(ids)] for i in range(chosen)) for place in range(len(ids) - 1))
        _, picked = score(Query(ids, len(ids) - 1, 0, rows))
        apart = float(abs(picked.given - scores.given).max())
        if apart > CLOSE:
            raise DpkdError(
                f"the server {url} fails the self-test: the log-probs of chosen ids are {apart:.2g} nats from those of "
                "the same tokens of the text"
            )
    return scores


def _same_tokens(url: str, tokenizer: Any, named: Sequence[tuple[int, str]]) -> None:
    """The text of tokens, by the server and by the student's tokenizer; parts of characters are left out."""
    for token, text in dict(named).items():
        own = tokenizer.decode([token]) if token < len(tokenizer) else ""
        piece = tokenizer.convert_ids_to_tokens(token) if token < len(tokenizer) else ""
        if "\ufffd" in own or "\ufffd" in text or token in tokenizer.all_special_ids:
            continue
        if text.strip() not in (own.strip(), str(piece).strip()):
            raise DpkdError(
                f"the teacher's server {url} has another tokenizer than the student: token {token} is {text!r} there "
                f"and {own!r} here. Serve a teacher of the student's family, or train on its text alone (--loss seqkd, "
                "teacher.protocol=openai)."
            )


def _same_positions(
    url: str, score: Any, protocol: Protocol, client: Client, ids: tuple[int, ...], whole: ServedScores
) -> None:
    """The log-prob of a drawn token is that of the same token in a text, and a shorter text has the same ones."""
    _, shorter = score(Query(ids[:-2], len(ids) - 3, 0))
    apart = float(abs(shorter.given - whole.given[:-2]).max()) if len(ids) > 3 else 0.0
    path, body = protocol.text_request("", ids, {"max_tokens": 1, "temperature": 0.0})
    drawn = protocol.text(client.post(path, body, server=url).result())
    if drawn.ids and drawn.logps:
        _, longer = score(Query((*ids, drawn.ids[0]), 1, 0))
        apart = max(apart, float(abs(longer.given[0] - drawn.logps[0])))
    if not apart <= CLOSE:
        raise DpkdError(
            f"the server {url} fails the self-test: log-probs of the same tokens differ by {apart:.2g} nats between "
            "two requests. Its positions are shifted, or its log-probs are not those of the model at temperature 1 "
            "(--logprobs-mode)."
        )
