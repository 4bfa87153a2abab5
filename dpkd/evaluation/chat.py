"""A chat endpoint of the OpenAI kind over httpx: one question, asked again by tenacity while that may help.

Nothing that a server says is shown or kept before the key is removed from it, whole or in part.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import httpx
import tenacity

from dpkd.errors import DpkdError, printable, redacted

LONGEST_PAUSE = 60.0
LARGEST_ANSWER = 2**20  # bytes
TRY_AGAIN = {408, 409, 425, 429, 500, 502, 503, 504, 529}
Accept = Callable[[str], bool]
Sleep = Callable[[float], Awaitable[None]]


@dataclass(frozen=True)
class Endpoint:
    """Where to ask, and how patiently.

    url       base URL (`https://api.openai.com/v1`), or that of `chat/completions` itself
    key       sent as a bearer token; never printed or written, and neither are passwords and queries of the URL
    extra     more fields of the request; None takes a field away
    timeout   seconds for a request as a whole, however slowly it is answered
    attempts  requests at most
    pause     seconds before the second request; doubled each time, up to a minute
    """

    url: str = field(repr=False)
    model: str
    key: str | None = field(default=None, repr=False)
    extra: Mapping[str, Any] = field(default_factory=dict)
    timeout: float = 60.0
    attempts: int = 6
    pause: float = 1.0

    def __post_init__(self) -> None:
        if self.key and not (self.key.isascii() and self.key.isprintable()):
            raise DpkdError("the key of the endpoint contains characters that are not allowed in an HTTP header")

    @property
    def address(self) -> str:
        """Where requests go. Raises DpkdError unless it is HTTP."""
        try:
            url = httpx.URL(self.url)
        except (httpx.InvalidURL, ValueError):
            url = httpx.URL("")
        if url.scheme not in ("http", "https") or not url.host:
            shown = self.redacted(self.url.split("?")[0])
            raise DpkdError(f"--endpoint {shown}: expected a URL such as https://api.openai.com/v1")
        path = url.path.rstrip("/")
        return str(url.copy_with(path=path if path.endswith("/chat/completions") else f"{path}/chat/completions"))

    @property
    def place(self) -> str:
        """The address as it may be shown: without user, password and query."""
        return str(httpx.URL(self.address).copy_with(userinfo=b"", query=None, fragment=None))

    def body(self, messages: Sequence[Mapping[str, str]]) -> dict[str, Any]:
        """The request."""
        fields = {"model": self.model, "messages": list(messages), "temperature": 0, "max_tokens": 512, **self.extra}
        return {name: value for name, value in fields.items() if value is not None}

    def redacted(self, text: str) -> str:
        """A text without the endpoint's secrets, and without what a terminal would act on."""
        try:
            url = httpx.URL(self.url)
            secrets = [self.key or "", url.password, *url.params.values()]
        except (httpx.InvalidURL, ValueError):
            secrets = [self.key or ""]
        return printable(redacted(text, [secret for secret in secrets if secret]))


@dataclass(frozen=True)
class Reply:
    """An answer with what it cost, the attempts that failed included; `accepted` says whether it could be used."""

    text: str
    accepted: bool
    prompt_tokens: int = 0
    completion_tokens: int = 0
    attempts: int = 1


class _Failed(Exception):
    """An attempt that may be repeated: why, and how long the server asks to wait."""

    def __init__(self, reason: str, wait: float | None = None) -> None:
        super().__init__(reason)
        self.wait = wait


def client() -> httpx.AsyncClient:
    """A pool of connections. Redirects are not followed: another host must not get the key."""
    return httpx.AsyncClient(follow_redirects=False, timeout=None)


async def chat(
    http: httpx.AsyncClient,
    endpoint: Endpoint,
    messages: Sequence[Mapping[str, str]],
    accept: Accept,
    *,
    sleep: Sleep = asyncio.sleep,
    say: Callable[[str], None] | None = None,
) -> Reply:
    """Ask until an answer is acceptable, at most `endpoint.attempts` times; `say` is told why it takes longer.

    An answer that never is comes back with `accepted=False`. Raises DpkdError when the server refuses the request, and
    when it gave no answer at all.
    """
    asked = answered = 0
    last: Reply | None = None

    async def once() -> Reply:
        nonlocal asked, answered, last
        text, tokens = await _ask(http, endpoint, messages)
        asked, answered = asked + tokens[0], answered + tokens[1]
        last = Reply(text, accept(text), asked, answered)
        return last

    def pause(state: tenacity.RetryCallState) -> float:
        error = state.outcome.exception() if state.outcome is not None else None
        asked_for = error.wait if isinstance(error, _Failed) else None
        return min(LONGEST_PAUSE, endpoint.pause * 2 ** (state.attempt_number - 1) if asked_for is None else asked_for)

    def trouble(state: tenacity.RetryCallState) -> None:
        error = state.outcome.exception() if state.outcome is not None else None
        if say is not None and error is not None and state.next_action is not None:
            say(f"{endpoint.place}: {error}; asked again in {state.next_action.sleep:.0f} s")

    retrying = tenacity.AsyncRetrying(
        stop=tenacity.stop_after_attempt(endpoint.attempts),
        wait=pause,
        retry=tenacity.retry_if_exception_type(_Failed) | tenacity.retry_if_result(lambda reply: not reply.accepted),
        sleep=sleep,
        before_sleep=trouble,
    )
    try:
        reply: Reply = await retrying(once)
    except tenacity.RetryError as error:
        if last is not None:
            return replace(last, attempts=endpoint.attempts)
        raise DpkdError(
            f"{endpoint.place} gave no answer in {endpoint.attempts} attempts; the last failed: "
            f"{error.last_attempt.exception()}. Completed judgements are saved; rerun to resume."
        ) from None
    return replace(reply, attempts=retrying.statistics["attempt_number"])


async def _ask(
    http: httpx.AsyncClient, endpoint: Endpoint, messages: Sequence[Mapping[str, str]]
) -> tuple[str, tuple[int, int]]:
    """One request: the text without secrets, and the tokens of question and answer."""
    headers = {"Authorization": f"Bearer {endpoint.key}"} if endpoint.key else {}
    try:
        async with (
            asyncio.timeout(endpoint.timeout),
            http.stream("POST", endpoint.address, json=endpoint.body(messages), headers=headers) as response,
        ):
            raw = bytearray()
            async for part in response.aiter_bytes():
                raw += part
                if len(raw) > LARGEST_ANSWER:
                    raise _Failed(f"an answer of more than {LARGEST_ANSWER:,} bytes")
    except TimeoutError as error:
        raise _Failed(f"no complete reply within {endpoint.timeout:g} s") from error
    except (httpx.HTTPError, OSError) as error:  # no connection, half an answer
        reason = endpoint.redacted(f"{type(error).__name__}: {error}".rstrip(": "))
        raise _Failed(reason) from error
    said = endpoint.redacted(bytes(raw).decode("utf-8", "replace"))
    if response.status_code != 200:
        raise _refused(endpoint, response, " ".join(said.split())[:300])
    return _understood(bytes(raw), said, endpoint)


def _refused(endpoint: Endpoint, response: httpx.Response, said: str) -> Exception:
    """An attempt to repeat, or an error to show: a wrong key or model stays wrong."""
    what = f"HTTP {response.status_code} {endpoint.redacted(response.reason_phrase)}{f': {said}' if said else ''}"
    if response.status_code in TRY_AGAIN:
        asked = response.headers.get("Retry-After", "")
        return _Failed(what, float(asked[:9]) if asked.isascii() and asked.isdigit() else None)
    advice = " Set the key in DPKD_JUDGE_KEY." if response.status_code in (401, 403) else ""
    return DpkdError(f"{endpoint.place} refuses the request: {what}.{advice}")


def _understood(raw: bytes, said: str, endpoint: Endpoint) -> tuple[str, tuple[int, int]]:
    """The text and the tokens of a response. Raises _Failed for what is no such response."""
    try:
        response = json.loads(raw)
        text = response["choices"][0]["message"]["content"]
        usage = response.get("usage") or {}
        tokens = (int(usage.get("prompt_tokens", 0)), int(usage.get("completion_tokens", 0)))
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, OverflowError, RecursionError) as error:
        raise _Failed(f"no chat completion: {' '.join(said.split())[:200] or 'an empty response'}") from error
    if not isinstance(text, str):
        raise _Failed("a chat completion without text")
    return endpoint.redacted(text), tokens
