"""A chat endpoint of the OpenAI kind: one request, tried again with growing pauses while that may help."""

from __future__ import annotations

import http.client
import json
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlparse

from dpkd.errors import DpkdError

LONGEST_PAUSE = 60.0
LARGEST_ANSWER = 2**24  # bytes
TRY_AGAIN = {408, 409, 425, 429, 500, 502, 503, 504, 529}
Accept = Callable[[str], bool]


@dataclass(frozen=True)
class Endpoint:
    """Where to ask, and how patiently.

    url       base URL (`https://api.openai.com/v1`), or that of `chat/completions` itself
    key       sent as a bearer token; never printed or written
    extra     more fields of the request; None takes a field away
    timeout   seconds without an answer
    attempts  requests at most
    pause     seconds before the second request; doubled each time, up to a minute
    """

    url: str
    model: str
    key: str | None = field(default=None, repr=False)
    extra: Mapping[str, Any] = field(default_factory=dict)
    timeout: float = 60.0
    attempts: int = 6
    pause: float = 1.0

    def __post_init__(self) -> None:
        if self.key and not (self.key.isascii() and self.key.isprintable()):
            raise DpkdError("the key of the endpoint holds characters that no HTTP header may have")

    @property
    def address(self) -> str:
        """Where requests go. Raises DpkdError unless it is HTTP."""
        parts = urlparse(self.url)
        if parts.scheme not in ("http", "https") or not parts.netloc:
            raise DpkdError(f"--endpoint {self.url}: expected a URL such as https://api.openai.com/v1")
        base = self.url.rstrip("/")
        return base if base.endswith("/chat/completions") else f"{base}/chat/completions"

    def body(self, messages: Sequence[Mapping[str, str]]) -> dict[str, Any]:
        """The request."""
        fields = {"model": self.model, "messages": list(messages), "temperature": 0, "max_tokens": 512, **self.extra}
        return {name: value for name, value in fields.items() if value is not None}


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


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Another host must not get the key, nor a GET the question."""

    def redirect_request(self, *_: Any, **__: Any) -> None:
        return None


def chat(
    endpoint: Endpoint,
    messages: Sequence[Mapping[str, str]],
    accept: Accept,
    *,
    sleep: Callable[[float], None] = time.sleep,
) -> Reply:
    """Ask until an answer is acceptable, at most `endpoint.attempts` times.

    An answer that never is comes back with `accepted=False`. Raises DpkdError when the server refuses the request, and
    when it gave no answer at all.
    """
    text, asked, answered, failure = None, 0, 0, ""
    for attempt in range(1, endpoint.attempts + 1):
        wait = None
        try:
            text, tokens = _ask(endpoint, messages)
            asked, answered = asked + tokens[0], answered + tokens[1]
            if accept(text):
                return Reply(text, True, asked, answered, attempt)
        except _Failed as error:
            failure, wait = str(error), error.wait
        if attempt < endpoint.attempts:
            sleep(min(LONGEST_PAUSE, wait if wait is not None else endpoint.pause * 2 ** (attempt - 1)))
    if text is None:
        raise DpkdError(
            f"{endpoint.address} gave no answer in {endpoint.attempts} attempts; the last failed: {failure}. "
            "What was judged is kept: call again later."
        )
    return Reply(text, False, asked, answered, endpoint.attempts)


def _ask(endpoint: Endpoint, messages: Sequence[Mapping[str, str]]) -> tuple[str, tuple[int, int]]:
    """One request: the text, and tokens of question and answer."""
    headers = {"Content-Type": "application/json"}
    if endpoint.key:
        headers["Authorization"] = f"Bearer {endpoint.key}"
    data = json.dumps(endpoint.body(messages)).encode()
    request = urllib.request.Request(endpoint.address, data, headers, method="POST")
    try:
        with urllib.request.build_opener(_NoRedirect).open(request, timeout=endpoint.timeout) as response:
            return _understood(response.read(LARGEST_ANSWER))
    except urllib.error.HTTPError as error:
        raise _refused(endpoint, error) from error
    except (OSError, http.client.HTTPException) as error:  # no connection, a time-out, half an answer
        reason = getattr(error, "reason", None) or error
        raise _Failed(f"{type(reason).__name__}: {reason}" if str(reason) else type(reason).__name__) from error


def _refused(endpoint: Endpoint, error: urllib.error.HTTPError) -> Exception:
    """An attempt to repeat, or an error to show: a wrong key or model stays wrong."""
    try:
        said = " ".join(error.read(2000).decode("utf-8", "replace").split())[:300]
    except (OSError, http.client.HTTPException):
        said = ""
    if endpoint.key:
        said = said.replace(endpoint.key, "…")
    what = f"HTTP {error.code} {error.reason}{f': {said}' if said else ''}"
    if error.code in TRY_AGAIN:
        asked = error.headers.get("Retry-After", "")
        return _Failed(what, float(asked) if asked.isascii() and asked.isdigit() else None)
    advice = " Set the key in DPKD_JUDGE_KEY." if error.code in (401, 403) else ""
    return DpkdError(f"{endpoint.address} refuses the request: {what}.{advice}")


def _understood(raw: bytes) -> tuple[str, tuple[int, int]]:
    """The text and the tokens of a response. Raises _Failed for what is no such response."""
    try:
        response = json.loads(raw)
        text = response["choices"][0]["message"]["content"]
        usage = response.get("usage") or {}
        tokens = (int(usage.get("prompt_tokens", 0)), int(usage.get("completion_tokens", 0)))
    except (ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
        shown = " ".join(raw[:200].decode("utf-8", "replace").split())
        raise _Failed(f"no chat completion: {shown or 'an empty response'}") from error
    if not isinstance(text, str):
        raise _Failed("a chat completion without text")
    return text, tokens
