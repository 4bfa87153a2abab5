"""`dpkd push` against a stand-in for the hub on this machine, and `dpkd export` with a converter in place."""

from __future__ import annotations

import base64
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from typer.testing import CliRunner

from dpkd.cli.main import app
from dpkd.errors import DpkdError
from dpkd.publish import export_gguf, push


class Hub(BaseHTTPRequestHandler):
    """The three calls of a commit; what comes in is kept on the server."""

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.headers.get("Transfer-Encoding") == "chunked":
            body = b""
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        answer, status = {}, 200
        if self.headers.get("Authorization") != "Bearer hf_test":
            answer, status = {"error": "Invalid username or password."}, 401
        elif self.path == "/api/repos/create":
            self.server.created = json.loads(body)
            answer = {"url": f"http://{self.headers['Host']}/me/student", "name": "me/student"}
        elif self.path.endswith("/preupload/main"):
            files = json.loads(body)["files"]
            answer = {"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files]}
        elif "/commit/main" in self.path:
            for row in map(json.loads, body.decode().splitlines()):
                if row["key"] == "file":
                    self.server.files[row["value"]["path"]] = base64.b64decode(row["value"]["content"])
            url = f"http://{self.headers['Host']}/me/student/commit/abc"
            answer = {"success": True, "commitOid": "abc", "commitUrl": url, "hookOutput": ""}
        text = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def hub(monkeypatch):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.created, server.files = None, {}
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("HF_TOKEN", "hf_test")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def finished(tmp_path: Path) -> Path:
    run = tmp_path / "run"
    for name, files in {
        "model": {"config.json": b"{}", "model.safetensors": bytes(range(256)) * 40, "README.md": b"not this"},
        "adapter": {"adapter_config.json": b"{}", "adapter_model.safetensors": b"adapter"},
        ".": {"README.md": b"---\nlicense: mit\n---\n# card\n", "config.resolved.yaml": b"{}\n", "metrics.jsonl": b""},
    }.items():
        (run / name).mkdir(parents=True, exist_ok=True)
        for file, content in files.items():
            (run / name / file).write_bytes(content)
    return run


def test_model_and_card_are_one_commit(hub, finished):
    result = CliRunner().invoke(app, ["push", str(finished), "me/student", "--private"])
    assert result.exit_code == 0, result.exception
    assert result.stdout.strip().endswith("/me/student/commit/abc")
    assert hub.created["name"] == "student"
    assert hub.created.get("private") is True or hub.created.get("visibility") == "private"
    model = finished / "model"
    assert hub.files == {
        "config.json": b"{}",
        "model.safetensors": (model / "model.safetensors").read_bytes(),
        "README.md": (finished / "README.md").read_bytes(),
    }


def test_without_a_network_it_is_a_sentence(hub, finished, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # nobody listens
    with pytest.raises(DpkdError, match=r"me/student: http://127.0.0.1:9 does not take the model: .*check the network"):
        push(finished, "me/student")


def test_a_name_without_an_owner_asks_nobody(finished):
    with pytest.raises(DpkdError, match="badname is not a name for the hub: expected OWNER/NAME"):
        push(finished, "badname")


def test_adapters_alone(hub, finished):
    push(finished, "me/student", adapter=True)
    assert hub.files.keys() == {"adapter_config.json", "adapter_model.safetensors", "README.md"}


def test_what_cannot_be_pushed_is_a_sentence(hub, finished, monkeypatch):
    with pytest.raises(DpkdError, match="is not a name for the hub: expected OWNER/NAME"):
        push(finished, "a b/c")
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(DpkdError, match=r"does not take the model: .*401.*hf auth login"):
        push(finished, "me/student")
    assert not hub.files
    (finished / "model").rename(finished / "elsewhere")
    with pytest.raises(DpkdError, match="is not finished: it has no model yet"):
        push(finished, "me/student")


CONVERTER = """
import sys
from pathlib import Path
model, out = Path(sys.argv[1]), Path(sys.argv[sys.argv.index("--outfile") + 1])
if (model / "broken").exists():
    out.write_bytes(b"half")
    sys.exit("ERROR: unknown architecture")
out.write_bytes(b"GGUF" + sys.argv[sys.argv.index("--outtype") + 1].encode())
"""


def test_export_runs_the_converter(finished, tmp_path, monkeypatch):
    home = tmp_path / "llama.cpp"
    home.mkdir()
    (home / "convert_hf_to_gguf.py").write_text(CONVERTER)
    monkeypatch.setenv("LLAMA_CPP", str(home))
    result = CliRunner().invoke(app, ["export", str(finished), "--format", "gguf", "--type", "q8_0"])
    assert result.exit_code == 0, result.exception
    assert Path(result.stdout.strip()) == finished / "model-q8_0.gguf"
    assert (finished / "model-q8_0.gguf").read_bytes() == b"GGUFq8_0"
    (finished / "model" / "broken").touch()
    with pytest.raises(DpkdError, match=r"failed with exit code 1: ERROR: unknown architecture\. To see all of it"):
        export_gguf(finished, outtype="bf16")
    assert [path.name for path in finished.iterdir() if "bf16" in path.name] == []


def test_export_follows_no_planted_link(finished, tmp_path):
    (tmp_path / "victim").write_text("mine")
    for name in ("model.gguf", ".model.gguf.part"):
        (tmp_path / name).symlink_to(tmp_path / "victim")
    converter = tmp_path / "convert_hf_to_gguf.py"
    converter.write_text(CONVERTER)
    assert export_gguf(finished, tmp_path / "model.gguf", converter=converter).read_bytes() == b"GGUFf16"
    assert (tmp_path / "victim").read_text() == "mine"


def test_without_a_converter_it_says_where_to_get_it(finished, monkeypatch, tmp_path):
    monkeypatch.delenv("LLAMA_CPP", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(
        DpkdError, match=r"neither on PATH nor in LLAMA_CPP\. Get it: git clone https://github\.com/ggml"
    ):
        export_gguf(finished)
    with pytest.raises(DpkdError, match=r"here\.py does not exist"):
        export_gguf(finished, converter=Path("here.py"))
