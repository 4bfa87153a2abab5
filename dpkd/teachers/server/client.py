"""The HTTP client of a served teacher: one pool of connections in a thread of its own, for all its servers.

Requests are futures, so that answers arrive while the student computes. What a server may recover from (429, 5xx, a
lost connection) is tried again with growing pauses, on another server where there is one.
"""

from __future__ import annotations

import asyncio
import json
import os
import threading
import time
from collections.abc import Coroutine, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import httpx
from tenacity import (
    AsyncRetrying,
    RetryCallState,
    retry_if_exception_type,
    stop_after_attempt,
    stop_after_delay,
    stop_all,
    wait_exponential,
    wait_random,
)

from dpkd.api.teachers import TeacherLost
from dpkd.errors import DpkdError, printable, redacted
from dpkd.models.settings import ClientSettings

RECOVERABLE = frozenset({408, 425, 429, 500, 502, 503, 504})
GROWING = wait_exponential(multiplier=0.1, max=10.0) + wait_random(0.0, 0.1)
# A server that gave no answer is asked last for so many seconds.
REST = 10.0


class ServerRefusal(DpkdError):
    """A server answered that it will not do what was asked; `status` is that of HTTP."""

    def __init__(self, text: str, status: int) -> None:
        self.status = status
        super().__init__(text)


class _Recoverable(Exception):
    """A request that may succeed when it is sent again, `after` seconds at the earliest."""

    def __init__(self, reason: str, after: float = 0.0) -> None:
        self.after = after
        super().__init__(reason)


@dataclass
class _Endpoint:
    """A server: how many requests it is working on, and until when it is asked last."""

    url: str
    in_flight: int = 0
    rests_until: float = 0.0


class Client:
    """Sends requests to the servers of a teacher; to that with the fewest in flight, where none is named."""

    def __init__(self, urls: Sequence[str], settings: ClientSettings) -> None:
        self._endpoints = {url: _Endpoint(url) for url in urls}
        self._settings = settings
        self._loop: asyncio.AbstractEventLoop | None = None
        self.retried = 0

    @property
    def urls(self) -> list[str]:
        """Of the servers, without the path of an API."""
        return list(self._endpoints)

    def get(self, path: str, *, server: str | None = None) -> Future[Any]:
        """The JSON at a path. The future raises ServerRefusal or TeacherLost."""
        return self.run(self.send("GET", path, None, server))

    def post(self, path: str, body: Mapping[str, Any], *, server: str | None = None) -> Future[Any]:
        """The JSON that answers a body. The future raises ServerRefusal or TeacherLost."""
        return self.run(self.send("POST", path, body, server))

    def run(self, work: Coroutine[Any, Any, Any]) -> Future[Any]:
        """Start work in the client's thread, which is started by the first."""
        if self._loop is None:
            self._start()
        assert self._loop is not None
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    async def send(self, method: str, path: str, body: Mapping[str, Any] | None, server: str | None = None) -> Any:
        """One request, with its retries; for coroutines that are given to `run`."""
        content = None if body is None else json.dumps(body).encode()
        began, settings = time.monotonic(), self._settings
        retrying = AsyncRetrying(
            retry=retry_if_exception_type(_Recoverable),
            stop=stop_all(stop_after_attempt(settings.retries + 1), stop_after_delay(settings.wait)),
            wait=_pause,
            reraise=True,
        )
        async with self._slots:
            try:
                async for attempt in retrying:
                    with attempt:
                        self.retried += attempt.retry_state.attempt_number > 1
                        return await self._once(method, path, content, server)
            except _Recoverable as error:
                where = server or " and ".join(self._endpoints)
                seconds = time.monotonic() - began
                raise TeacherLost(f"the teacher's server {where} gives no answer: {error} ({seconds:.0f} s)") from error

    def close(self) -> None:
        """Close the connections and end the thread; requests in flight are dropped."""
        if self._loop is None:
            return
        loop, self._loop = self._loop, None
        asyncio.run_coroutine_threadsafe(self._shut(), loop).result()
        loop.call_soon_threadsafe(loop.stop)
        self._thread.join()
        loop.close()

    @property
    def _key(self) -> str:
        return os.environ.get(self._settings.key_variable, "")

    def _start(self) -> None:
        loop = asyncio.new_event_loop()
        many = self._settings.in_flight * len(self._endpoints)
        self._slots = asyncio.Semaphore(many)
        key = self._key
        self._http = httpx.AsyncClient(
            headers={"Content-Type": "application/json", **({"Authorization": f"Bearer {key}"} if key else {})},
            limits=httpx.Limits(max_connections=many, max_keepalive_connections=many),
            timeout=httpx.Timeout(self._settings.read_timeout, connect=self._settings.connect_timeout, pool=None),
        )
        self._thread = threading.Thread(target=loop.run_forever, name="dpkd-teacher-client", daemon=True)
        self._thread.start()
        self._loop = loop

    async def _shut(self) -> None:
        own = asyncio.current_task()
        others = [task for task in asyncio.all_tasks() if task is not own]
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        await self._http.aclose()

    async def _once(self, method: str, path: str, content: bytes | None, server: str | None) -> Any:
        endpoint = self._endpoints[server] if server else self._least_busy()
        endpoint.in_flight += 1
        try:
            response = await self._http.request(method, endpoint.url + path, content=content)
        except (httpx.TransportError, httpx.InvalidURL) as error:
            endpoint.rests_until = time.monotonic() + REST
            raise _Recoverable(self._shown(f"{type(error).__name__} {error}".strip())) from error
        finally:
            endpoint.in_flight -= 1
        if response.status_code in RECOVERABLE:
            endpoint.rests_until = time.monotonic() + (REST if response.status_code != 429 else 0.0)
            raise _Recoverable(f"HTTP {response.status_code} {self._message(response)}", _retry_after(response))
        if response.status_code >= 400:
            raise ServerRefusal(self._refusal(endpoint.url, path, response), response.status_code)
        try:
            return response.json()
        except ValueError as error:
            text = self._shown(response.text[:4000])[:80]
            raise ServerRefusal(f"{endpoint.url}{path} answers with no JSON: {text!r}", 200) from error

    def _least_busy(self) -> _Endpoint:
        now = time.monotonic()
        return min(self._endpoints.values(), key=lambda one: (one.rests_until > now, one.in_flight))

    def _refusal(self, url: str, path: str, response: httpx.Response) -> str:
        text = f"{url}{path} answers {response.status_code}: {self._message(response)}"
        if response.status_code in (401, 403):
            return f"{text}. Put the server's key into the environment variable {self._settings.key_variable}."
        return text

    def _message(self, response: httpx.Response) -> str:
        """What the server says of an error: the message that OpenAI's form of errors has, else the body."""
        try:
            found = response.json()
            error = found.get("error", found) if isinstance(found, dict) else found
            text = error.get("message", error.get("detail", error)) if isinstance(error, dict) else error
        except ValueError:
            text = response.text
        return " ".join(self._shown(str(text)[:4000]).split())[:300]

    def _shown(self, text: str) -> str:
        """A text of a server without the key, which servers echo, and without what a terminal would act on."""
        return printable(redacted(text, [self._key] if self._key else []))


def _pause(state: RetryCallState) -> float:
    """Seconds before the next attempt: growing, random, and never less than the server asked for."""
    error = state.outcome.exception() if state.outcome is not None else None
    return max(getattr(error, "after", 0.0), GROWING(state))


def _retry_after(response: httpx.Response) -> float:
    try:
        return min(60.0, max(0.0, float(response.headers.get("Retry-After", "0"))))
    except ValueError:  # a date: the growing pause has to do
        return 0.0
