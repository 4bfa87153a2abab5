"""A server on the loopback that answers as vLLM, SGLang or any OpenAI-compatible server documents, and fails on demand.

Written from the protocols, around a real small model of transformers: it stands in for what the CPU build of vLLM
cannot answer (chosen ids, SGLang) and for ugly answers that no real server gives when it is asked to.
"""

from __future__ import annotations

import base64
import io
import json
import threading
import warnings
from collections.abc import Callable
from copy import deepcopy
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
import torch


class FakeServer:
    """`failures` are taken one by one, before an answer: a status, `drop` (no answer) or a function that changes it."""

    def __init__(self, model, tokenizer, *, name="toy", max_logprobs=20, context=256, dies_of_unknown_ids=True) -> None:
        self.model, self.tokenizer, self.name = model.eval(), tokenizer, name
        self.max_logprobs, self.context, self.dies = max_logprobs, context, dies_of_unknown_ids
        self.failures: list[int | str | Callable[[dict[str, Any]], Any]] = []
        self.spoil: Callable[[dict[str, Any]], Any] | None = None  # changes every answer
        self.requests: list[tuple[str, dict[str, Any]]] = []
        self.headers: list[dict[str, str]] = []
        self.has_chosen_ids = True
        self.adapters: dict[str, Any] | None = None  # by name, where adapters may be loaded
        self.most_in_flight = self._in_flight = 0
        self._lock = threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self):
                outer._serve(self, None)

            def do_POST(self):
                length = int(self.headers["Content-Length"])
                outer._serve(self, json.loads(self.rfile.read(length)))

            def log_message(self, *_):
                pass

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}"
        threading.Thread(target=self._http.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._http.shutdown()
        self._http.server_close()

    def asked(self, path: str) -> list[dict[str, Any]]:
        """The bodies that a path got."""
        return [body for where, body in self.requests if where == path]

    def _serve(self, handler, body) -> None:
        with self._lock:
            self.requests.append((handler.path, body or {}))
            self.headers.append(dict(handler.headers))
            failure = self.failures.pop(0) if self.failures and body is not None else None
            self._in_flight += 1
            self.most_in_flight = max(self.most_in_flight, self._in_flight)
        try:
            if failure == "drop":
                handler.close_connection = True
                handler.connection.close()
                return
            if isinstance(failure, int):
                _send(handler, failure, {"error": {"message": "try later"}}, {"Retry-After": "0"})
                return
            status, answer = self._answer(handler.path, body)
            for change in (failure, self.spoil):
                answer = change(answer) if callable(change) and status == 200 and body is not None else answer
            _send(handler, status, answer)
        finally:
            with self._lock:
                self._in_flight -= 1

    def _answer(self, path: str, body) -> tuple[int, Any]:
        if path == "/v1/models":
            return 200, {"data": [{"id": self.name, "max_model_len": self.context}]}
        if path == "/v1/completions":
            return self._completions(body)
        if path == "/inference/v1/generate" and self.has_chosen_ids:
            return self._chosen(body)
        if path == "/generate":
            return self._sglang(body)
        if path.endswith("load_lora_adapter") and self.adapters is not None:
            return self._adapter(path, body)
        return 404, {"detail": "Not Found"}

    def _adapter(self, path: str, body) -> tuple[int, Any]:
        from peft import PeftModel

        assert self.adapters is not None
        if path == "/v1/unload_lora_adapter":
            del self.adapters[body["lora_name"]]
        else:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
                loaded = PeftModel.from_pretrained(deepcopy(self.model), body["lora_path"])
            self.adapters[body["lora_name"]] = loaded.eval()
        return 200, b"Success"

    @torch.no_grad()
    def logps(self, ids, model=None) -> torch.Tensor:
        """`[T, V]`: row t has the distribution of token t + 1."""
        size = self.model.config.vocab_size
        if self.dies and any(not 0 <= i < size for i in ids):
            self.close()
            raise AssertionError("an id beyond the vocabulary was sent")
        return (model or self.model)(torch.tensor([list(ids)])).logits[0].float().log_softmax(-1)

    def _draw(self, ids, limit, stops, temperature, seed, model=None) -> tuple[list[int], list[float]]:
        generator = torch.Generator().manual_seed(int(seed or 0))
        drawn, logps = [], []
        while len(drawn) < limit and len(ids) + len(drawn) < self.context:
            row = self.logps([*ids, *drawn], model)[-1]
            chance = (row / temperature).softmax(-1) if temperature else None
            token = int(row.argmax()) if chance is None else int(torch.multinomial(chance, 1, generator=generator))
            drawn.append(token)
            logps.append(float(row[token]))
            if token in stops:
                break
        return drawn, logps

    def _completions(self, body) -> tuple[int, Any]:
        model = (self.adapters or {}).get(body["model"])
        if body["model"] != self.name and model is None:
            return 404, {"error": {"message": f"The model `{body['model']}` does not exist."}}
        ids = body["prompt"]
        if isinstance(ids, str):
            ids = self.tokenizer(ids, add_special_tokens=False)["input_ids"]
        if len(ids) + body["max_tokens"] > self.context:
            return 400, {"error": {"message": "This model's maximum context length is exceeded."}}
        k = body.get("prompt_logprobs")
        if k is not None and k > self.max_logprobs:
            return 400, {"error": {"message": f"Requested prompt logprobs of {k}, max allowed: {self.max_logprobs}"}}
        stops = set(body.get("stop_token_ids", ())) | {self.tokenizer.eos_token_id}
        drawn, logps = self._draw(ids, body["max_tokens"], stops, body.get("temperature", 1.0), body.get("seed"), model)
        ended = bool(drawn) and drawn[-1] in stops
        choice: dict[str, Any] = {
            "text": self.tokenizer.decode(drawn, skip_special_tokens=True),
            "finish_reason": "stop" if ended else "length",
        }
        if "logprobs" in body:
            choice["logprobs"] = {"tokens": [f"token_id:{i}" for i in drawn], "token_logprobs": logps}
        if k is not None:
            choice["prompt_logprobs"] = [None, *(self._entry(row, i, k) for row, i in self._rows(ids))]
        return 200, {"choices": [choice]}

    def _rows(self, ids):
        return zip(self.logps(ids)[:-1], ids[1:], strict=True)

    def _entry(self, row, given, k) -> dict[str, Any]:
        top = range(len(row)) if k == -1 else row.topk(min(k, len(row))).indices.tolist()
        return {str(i): {"logprob": float(row[i]), "decoded_token": self.tokenizer.decode([i])} for i in [*top, given]}

    def _chosen(self, body) -> tuple[int, Any]:
        ids, sampling = body["token_ids"], body["sampling_params"]
        rows, start = sampling["prompt_logprob_token_ids"], sampling["prompt_logprob_start"]
        if len(rows) != len(ids) - 1 - start:
            return 400, {"error": {"message": "prompt_logprob_token_ids has the wrong number of rows"}}
        if len(rows[0]) > self.max_logprobs:
            return 400, {"error": {"message": f"{len(rows[0])} ids, max allowed: {self.max_logprobs}"}}
        scores = self.logps(ids)[start:-1].gather(1, torch.tensor(rows)).numpy().astype(np.float32)
        packed = io.BytesIO()
        np.save(packed, scores)
        return 200, {"prompt_token_id_logprobs": base64.b64encode(packed.getvalue()).decode(), "choices": []}

    def _sglang(self, body) -> tuple[int, Any]:
        ids, start = body["input_ids"], body.get("logprob_start_len", len(body["input_ids"]))
        sampling = body["sampling_params"]
        stops = set(sampling.get("stop_token_ids", ())) | {self.tokenizer.eos_token_id}
        drawn, logps = self._draw(
            ids, sampling["max_new_tokens"], stops, sampling["temperature"], sampling.get("sampling_seed")
        )
        tokens = [[value, i, self.tokenizer.decode([i])] for value, i in zip(logps, drawn, strict=True)]
        reason = "stop" if drawn and drawn[-1] in stops else "length"
        meta: dict[str, Any] = {"output_token_logprobs": tokens, "finish_reason": {"type": reason}}
        if body.get("return_logprob") and start < len(ids):
            rows = list(self._rows(ids))[start:]

            def listed(row, wanted):
                return [[float(row[i]), i, self.tokenizer.decode([i])] for i in wanted]

            meta["input_token_logprobs"] = [[None, ids[start], ""], *(listed(row, [i])[0] for row, i in rows)]
            if k := body.get("top_logprobs_num"):
                meta["input_top_logprobs"] = [None, *(listed(row, row.topk(k).indices.tolist()) for row, _ in rows)]
            if wanted := body.get("token_ids_logprob"):
                meta["input_token_ids_logprobs"] = [None, *(listed(row, wanted) for row, _ in rows)]
        return 200, {"text": self.tokenizer.decode(drawn, skip_special_tokens=True), "meta_info": meta}


def _send(handler, status: int, answer: Any, headers: dict[str, str] | None = None) -> None:
    content = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
    handler.send_response(status)
    handler.send_header("Content-Type", "application/json")
    handler.send_header("Content-Length", str(len(content)))
    for name, value in (headers or {}).items():
        handler.send_header(name, value)
    handler.end_headers()
    handler.wfile.write(content)
