"""The judge, against a local server that misbehaves."""

from __future__ import annotations

import base64
import json
import threading
import time
from collections.abc import Iterator
from contextlib import nullcontext, suppress
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from command_line import printed

from dpkd.errors import DpkdError, SettingsError
from dpkd.evaluation.chat import Endpoint
from dpkd.evaluation.judge import PROMPT, Prices, judge, messages_of, parse_score, verdict_files
from dpkd.evaluation.predictions import Prediction
from dpkd.locks import file_lock

KEY = "sk-very-secret"


def completion(text: Any, usage: Any = (10, 3)) -> tuple[int, bytes]:
    body: dict[str, Any] = {"choices": [{"message": {"role": "assistant", "content": text}}]}
    if usage is not None:
        body["usage"] = {"prompt_tokens": usage[0], "completion_tokens": usage[1]}
    return 200, json.dumps(body).encode()


class Server:
    """Answers with what `script` says, one entry a request and the last one for ever; keeps what it was asked."""

    def __init__(self) -> None:
        self.script: list[Any] = []
        self.requests: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.paths: list[str] = []
        lock, server = threading.Lock(), self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                raw = self.rfile.read(int(self.headers["Content-Length"]))
                with lock:
                    server.requests.append(json.loads(raw))
                    server.headers.append(dict(self.headers))
                    server.paths.append(self.path)
                    act = server.script.pop(0) if len(server.script) > 1 else server.script[0]
                act = act(server.requests[-1]) if callable(act) else act
                if act == "hang":
                    time.sleep(0.6)
                    return
                if act == "drop":
                    return
                if act == "drip":
                    with suppress(OSError):
                        for byte in b"HTTP/1.1 200 OK\r\nContent-Length: 900\r\n\r\n" + b" " * 900:
                            self.wfile.write(bytes([byte]))
                            self.wfile.flush()
                            time.sleep(0.05)
                    return
                status, body, *headers = act
                self.send_response(status)
                for name, value in headers:
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(body) + (50 if act[-1] == ("X-Cut", "1") else 0)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: Any) -> None:
                pass

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}/v1"
        self._thread = threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()


@pytest.fixture
def server(monkeypatch) -> Iterator[Server]:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    server = Server()
    yield server
    server.close()


def rows(count: int) -> list[Prediction]:
    return [Prediction(f"answer {i}", f"r:{i}", f"task {i}", (f"reference {i}",), 10) for i in range(count)]


def run(server: Server, folder: Path, count: int = 3, pauses: list[float] | None = None, **more: Any):
    settings = {"timeout": 0.3, "attempts": 4, **more.pop("endpoint", {})}
    given = rows(count)

    async def noted(seconds: float) -> None:
        if pauses is not None:
            pauses.append(seconds)

    return judge(
        given,
        [row.references for row in given],
        Endpoint(server.url, "judge-1", KEY, **settings),
        verdicts=folder / "v.jsonl",
        parallel=more.pop("parallel", 1),
        sleep=noted,
        **more,
    )


def test_scores_tokens_and_cost(server, tmp_path):
    server.script = [completion("Good.\nScore: 8"), completion("Bad.\nScore: 3"), completion("**Score: 7.5/10**")]
    report = run(server, tmp_path, prices=Prices(2.0, 10.0), summary=tmp_path / "s.json")
    assert report.scores == (8.0, 3.0, 7.5)
    facts = report.as_dict()
    assert (facts["rows"], facts["judged"], facts["mean"]) == (3, 3, pytest.approx(18.5 / 3))
    assert (facts["prompt_tokens"], facts["completion_tokens"]) == (30, 9)
    assert facts["cost"] == pytest.approx((30 * 2 + 9 * 10) / 1e6)
    assert json.loads((tmp_path / "s.json").read_text()) == facts
    assert server.paths == ["/v1/chat/completions"] * 3
    assert server.headers[0]["Authorization"] == f"Bearer {KEY}"
    request = server.requests[1]
    assert (request["model"], request["temperature"]) == ("judge-1", 0)
    asked = request["messages"][-1]["content"]
    for part in ("<task>\ntask 1\n</task>", "<reference>\nreference 1\n</reference>", "<answer>\nanswer 1\n</answer>"):
        assert part in asked


TROUBLE = {
    "too many requests": (429, b"slow down"),
    "server error": (500, b""),
    "gateway": (503, b"<html>"),
    "time-out": "hang",
    "drip": "drip",
    "huge": (200, b"x" * (2**20 + 1)),
    "deep": (200, b"[" * 100_000),
    "usage out of range": (200, completion("Score: 6")[1].replace(b": 10,", b": 1e999,")),
    "dropped": "drop",
    "half an answer": (200, b'{"choices"', ("X-Cut", "1")),
    "not json": (200, b"<html>hello</html>"),
    "not a completion": (200, b'{"choices": []}'),
    "a list": (200, b"[1, 2]"),
    "no text": completion(None),
    "not utf-8": (200, b"\xff\xfe"),
    "no score": completion("I cannot grade this."),
    "score out of range": completion("Score: 42"),
    "range for a score": completion("Score: 1-10"),
    "empty": completion(""),
}


@pytest.mark.parametrize("trouble", TROUBLE.values(), ids=TROUBLE)
def test_trouble_that_passes_is_tried_again(server, tmp_path, trouble):
    server.script = [trouble, trouble, completion("Score: 6")]
    pauses: list[float] = []
    report = run(server, tmp_path, 1, pauses)
    assert report.scores == (6.0,)
    assert pauses == [1.0, 2.0]
    assert len(server.requests) == 3
    paid = (
        3
        if isinstance(trouble, tuple)
        and b"usage" in trouble[1]
        and b"null" not in trouble[1]
        and b"1e999" not in trouble[1]
        else 1
    )
    assert report.new_tokens == (10 * paid, 3 * paid), "answers of no use are paid for too"


def test_the_server_may_say_how_long_to_wait(server, tmp_path):
    later = (429, b"", ("Retry-After", "7"))
    server.script = [later, (429, b"", ("Retry-After", "9999")), (429, b"", ("Retry-After", "soon")), completion("9")]
    pauses: list[float] = []
    assert run(server, tmp_path, 1, pauses).scores == (9.0,)
    assert pauses == [7.0, 60.0, 4.0]


def test_why_it_takes_longer_is_said_once(server, tmp_path):
    down = (503, b"overloaded")
    server.script = [down, down, completion("Score: 6"), down, completion("Score: 7")]
    said: list[str] = []
    run(server, tmp_path, 2, say=said.append)
    place = f"{server.url}/chat/completions"
    assert len(said) == 2
    for line, seconds in zip(said, (1, 2), strict=True):
        assert line.startswith(f"{place}: HTTP 503")
        assert line.endswith(f"overloaded; asked again in {seconds} s")


def test_an_endpoint_that_never_answers_is_an_error_and_keeps_what_was_judged(server, tmp_path):
    server.script = [completion("Score: 8"), (500, b"out of order")]
    with pytest.raises(DpkdError, match=r"gave no answer in 4 attempts; the last failed: HTTP 500 .*out of order"):
        run(server, tmp_path)
    assert len(server.requests) == 1 + 4
    server.script = [completion("Score: 2")]
    report = run(server, tmp_path)
    assert report.scores == (8.0, 2.0, 2.0)
    assert (report.asked, len(server.requests)) == (2, 1 + 4 + 2)


@pytest.mark.parametrize(("status", "hint"), [(401, "Set the key in DPKD_JUDGE_KEY"), (400, ""), (404, ""), (302, "")])
def test_a_refusal_is_not_repeated_and_never_shows_the_key(server, tmp_path, status, hint):
    server.script = [(status, f"wrong: {KEY}".encode(), ("Location", "http://127.0.0.1:9/elsewhere"))]
    with pytest.raises(DpkdError, match=f"refuses the request: HTTP {status} .*{hint}") as caught:
        run(server, tmp_path)
    assert KEY not in str(caught.value)
    assert len(server.requests) == 1


def test_a_row_that_never_gets_a_score_is_counted_and_asked_again(server, tmp_path):
    server.script = [lambda request: completion("no" if "task 1" in request["messages"][-1]["content"] else "Score: 5")]
    report = run(server, tmp_path)
    assert report.scores == (5.0, None, 5.0)
    assert (report.as_dict()["rows"], report.as_dict()["judged"], report.as_dict()["mean"]) == (3, 2, 5.0)
    assert report.new_tokens == (60, 18)
    server.script = [completion("Score: 7")]
    assert run(server, tmp_path).scores == (5.0, 7.0, 5.0)
    assert len(server.requests) == 2 + 4 + 1


def test_verdicts_are_kept_torn_lines_and_all(server, tmp_path):
    server.script = [completion("Score: 5", usage=None)]
    assert run(server, tmp_path, 4, parallel=3).scores == (5.0,) * 4
    file = tmp_path / "v.jsonl"
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join(lines[:2]) + lines[2][:20])
    assert run(server, tmp_path, 4).asked == 2
    assert run(server, tmp_path, 4).asked == 0
    assert KEY not in file.read_text()
    # Another question is another verdict.
    changed = [Prediction("another answer", "r:0", "task 0", ("reference 0",))]
    again = judge(changed, [("reference 0",)], Endpoint(server.url, "judge-1"), verdicts=file)
    assert again.asked == 1


def test_two_calls_do_not_pay_for_one_verdict(server, tmp_path):
    server.script = [completion("Score: 5")]
    with (
        file_lock(tmp_path / "v.jsonl"),
        pytest.raises(DpkdError, match=r"v\.jsonl is being written by another process"),
    ):
        run(server, tmp_path)
    assert server.requests == []
    assert run(server, tmp_path).asked == 3


def test_one_failure_ends_the_pauses_of_the_others(server, tmp_path):
    server.script = [(503, b""), (503, b""), (401, b"no")]
    began = time.monotonic()
    with pytest.raises(DpkdError, match="HTTP 401"):
        judge(rows(6), [("r",)] * 6, Endpoint(server.url, "m", pause=30.0), verdicts=tmp_path / "v.jsonl", parallel=3)
    assert time.monotonic() - began < 10


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ("Fine.\nScore: 7", 7),
        ("score = 10", 10),
        ("Score:\n\n4", 4),
        ("SCORE: 3 / 10", 3),
        ("8", 8),
        (" 8/10. ", 8),
        ("A score of 3 would be harsh.\nScore: 6", 6),
        ("Score: 0", None),
        ("Score: 10.5", None),
        ("Score: -3", None),
        ("Score: 10-20", None),
        ("about 7", None),
        ("Score: N", None),
        ("Score: 1 - 10", None),
        ("", None),
        ("2024", None),
    ],
)
def test_scores_are_read_with_care(text, score):
    assert parse_score(text) == score


def test_the_question_holds_texts_as_they_are():
    row = Prediction("{task} \\1 {reference}", "x", "say {answer}", ("ok {task}",))
    asked = messages_of(row, "ok {task}")[-1]["content"]
    assert "<answer>\n{task} \\1 {reference}\n</answer>" in asked
    assert "<task>\nsay {answer}\n</task>" in asked
    assert "(no answer)" in messages_of(Prediction(" ", "x", "t"), "r")[-1]["content"]
    with pytest.raises(DpkdError, match=r"p.jsonl:3: no `prompt`:"):
        messages_of(Prediction("a", where="p.jsonl:3"), "r")


@pytest.mark.parametrize("url", ["file:///etc/passwd", "localhost:80", "", "ftp://x/y", "http://", "http://a:b"])
def test_only_http_is_asked(url):
    with pytest.raises(DpkdError, match="expected a URL"):
        _ = Endpoint(url, "m").address


def echoes(key: str) -> dict[str, str]:
    raw = key.encode()
    return {
        "whole": key,
        "upper case": key.upper(),
        "half": key[: len(key) // 2],
        "masked": f"{key[:7]}***{key[-6:]}",
        "cut": "x" * 290 + key,
        "base64": base64.b64encode(raw).decode(),
        "base64 of the header": base64.b64encode(b"Bearer " + raw).decode(),
        "base64 of user and key": base64.b64encode(b"u:" + raw + b"!").decode(),
        "hexadecimal": raw.hex(),
        "percent-encoded": key.replace("/", "%2F"),
        "spelled": " ".join(key),
        "backwards": key[::-1],
        "over lines": key[:8] + "\n" + key[8:],
    }


SECRET = "sk-proj/Zx81Qw7Rt55LmN02"


def leaks(text: str) -> list[str]:
    """Stretches of seven or more characters of what was echoed, in any of its forms; a judge without the code."""
    squeezed = "".join(text.split()).lower()
    own = {**echoes(SECRET), "base64 of the header": base64.b64encode(f"Bearer {SECRET}".encode()).decode()[9:]}
    forms = [*own.values(), "hunter2-hunter2", "q-key-4711"]
    pieces = {f[i : i + 7] for f in ("".join(form.split()).lower() for form in forms) for i in range(len(f) - 6)}
    return [piece for piece in pieces if piece in squeezed and piece not in ("xxxxxxx",)]


@pytest.mark.parametrize("form", echoes(SECRET))
@pytest.mark.parametrize("status", [200, 401, 500])
def test_no_echo_of_a_key_is_shown_or_kept(server, tmp_path, form, status):
    """In the reason, the body and the stored reply; a password and a query of the URL are as secret."""
    said = f"{echoes(SECRET)[form]} hunter2-hunter2 q-key-4711"
    url = server.url.replace("http://", "http://me:hunter2-hunter2@") + "?key=q-key-4711"
    body = completion(f"{said}\nScore: 5")[1] if status == 200 else said.encode()
    server.script = [(status, body)]
    endpoint = Endpoint(url, "m", SECRET, attempts=1)
    assert leaks(repr(endpoint)) == []
    given = rows(1)
    refused = nullcontext() if status == 200 else pytest.raises(DpkdError, match="/v1/chat/completions")
    with refused as caught:
        judge(given, [("r",)], endpoint, verdicts=tmp_path / "v.jsonl", summary=tmp_path / "s.json")
    assert leaks("" if caught is None else str(caught.value)) == []
    for file in tmp_path.iterdir():
        assert leaks(file.read_text(encoding="utf-8")) == [], file
    assert server.paths == ["/v1/chat/completions?key=q-key-4711"]


def test_words_are_left_alone():
    text = "The answer is right, but skips the projection. Score: 8"
    assert Endpoint("https://a/v1", "m", SECRET).redacted(text) == text


def test_a_dripping_server_times_out_as_a_whole(server, tmp_path):
    server.script = ["drip"]
    began = time.monotonic()
    with pytest.raises(DpkdError, match=r"the last failed: no complete reply within 0.3 s"):
        run(server, tmp_path, 1, endpoint={"attempts": 2})
    assert time.monotonic() - began < 5


def test_terminal_escapes_of_a_server_are_words(server, tmp_path):
    server.script = [(400, b"\x1b]0;owned\x07 \x1b[2J wrong")]
    with pytest.raises(DpkdError, match=r"\\x1b\]0;owned\\x07 \\x1b\[2J wrong") as caught:
        run(server, tmp_path, 1)
    assert "\x1b" not in str(caught.value)
    server.script = [completion("\x1b[31mred\u202e\nScore: 4")]
    run(server, tmp_path, 1)
    assert json.loads((tmp_path / "v.jsonl").read_text())["reply"] == "\\x1b[31mred\\u202e\nScore: 4"


@pytest.mark.parametrize("line", ["{}", "[1]", '{"question": 3}', "\\x00", "[" * 9999, "NaN"])
def test_a_damaged_line_of_verdicts_is_named_and_nothing_is_asked(server, tmp_path, line):
    server.script = [completion("Score: 5")]
    run(server, tmp_path, 2)
    file = tmp_path / "v.jsonl"
    file.write_text(f"{line}\n{file.read_text()}")
    with pytest.raises(DpkdError, match=r"v\.jsonl:1: expected one JSON object"):
        run(server, tmp_path, 2)
    assert len(server.requests) == 2


@pytest.mark.parametrize(
    "change", [{"prompt_tokens": "many"}, {"score": None}, {"score": 11}, {"completion_tokens": 1.5}]
)
def test_a_verdict_without_its_counts_is_judged_again(server, tmp_path, change):
    server.script = [completion("Score: 5")]
    run(server, tmp_path, 2)
    file = tmp_path / "v.jsonl"
    first, second = file.read_text().splitlines()
    file.write_text(json.dumps({**json.loads(first), **change}) + f"\n{second}\n")
    report = run(server, tmp_path, 2)
    assert (report.scores, report.asked) == ((5.0, 5.0), 1)


def test_the_address_and_the_key():
    assert Endpoint("https://a/v1/", "m").address == "https://a/v1/chat/completions"
    assert Endpoint("https://a/v1/chat/completions", "m").address == "https://a/v1/chat/completions"
    assert KEY not in repr(Endpoint("https://a/v1", "m", KEY))
    assert Endpoint("https://u:p@a/v1?key=x", "m").address == "https://u:p@a/v1/chat/completions?key=x"
    assert Endpoint("https://u:p@a/v1?key=x", "m").place == "https://a/v1/chat/completions"
    assert "max_tokens" not in Endpoint("https://a", "m", extra={"max_tokens": None}).body([])
    with pytest.raises(DpkdError, match="contains characters") as caught:
        Endpoint("https://a/v1", "m", f"{KEY}\nX: y")
    assert KEY not in str(caught.value)


call = partial(printed, "judge", columns=80)


@pytest.fixture
def predictions(tmp_path) -> Path:
    path = tmp_path / "predictions-10.jsonl"
    path.write_text("".join(json.dumps(row.as_dict()) + "\n" for row in rows(5)))
    return path


def test_the_command(server, predictions, monkeypatch):
    monkeypatch.setenv("DPKD_JUDGE_KEY", f" {KEY}\n")
    server.script = [completion("Score: 4")]
    asked = ("--endpoint", server.url, "--model", "org/judge 1", "--price-prompt", 1, "--price-completion", 2)
    lines = call(predictions, *asked, "--limit", 3).splitlines()
    assert lines[0] == "org/judge 1: 4.00 (sd over rows 0.00), on a scale from 1 to 10"
    assert lines[1] == "3 rows of 5 in the file: 3 judged, 3 asked now"
    assert lines[2] == "30 + 9 tokens used now, cost 0.0000 (all rows: 0.0000)"
    file, summary = verdict_files(predictions, "org/judge 1")
    assert [path.name for path in (file, summary)] == [
        "predictions-10.judge-org-judge-1.jsonl",
        "predictions-10.judge-org-judge-1.json",
    ]
    assert [json.loads(line)["score"] for line in file.read_text().splitlines()] == [4.0] * 3
    assert server.headers[0]["Authorization"] == f"Bearer {KEY}"
    facts = json.loads(call(predictions, *asked, "--limit", 0, "--json"))
    assert (facts["rows"], facts["asked_now"]) == (5, 2)
    assert facts == json.loads(summary.read_text())
    with pytest.raises(SettingsError, match="--extra 3: expected a JSON object"):
        call(predictions, *asked, "--extra", 3)


def test_no_key_no_header_and_references_from_a_file(server, predictions, tmp_path, monkeypatch):
    monkeypatch.delenv("DPKD_JUDGE_KEY", raising=False)
    server.script = [completion("Score: 4")]
    references = tmp_path / "r.jsonl"
    references.write_text("".join(json.dumps({"id": f"r:{i}", "output": f"other {i}"}) + "\n" for i in range(5)))
    call(predictions, references, "--endpoint", server.url, "--model", "m", "--output", tmp_path / "out.jsonl")
    assert "Authorization" not in server.headers[0]
    assert any("other 3" in request["messages"][-1]["content"] for request in server.requests)
    assert (tmp_path / "out.json").exists()


PAGE = Path(__file__).parents[2] / "docs/evaluation.md"


def test_the_prompt_is_shown_in_the_docs():
    assert PROMPT in PAGE.read_text(encoding="utf-8")
