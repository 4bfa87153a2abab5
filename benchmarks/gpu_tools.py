"""What the parts of the GPU benchmark share: a book of what was measured, a clock, and models."""

from __future__ import annotations

import gc
import json
import math
import time
import warnings
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import torch

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
Numbers = dict[str, float]


class Book:
    """What was measured, by part and variant; a file keeps it."""

    def __init__(self, folder: Path, limit: float, only: Collection[str] = ()) -> None:
        """`only`: the variants that are measured; none named: all."""
        folder.mkdir(parents=True, exist_ok=True)
        self._path = folder / "gpu.jsonl"
        lines = self._path.read_text(encoding="utf-8").splitlines() if self._path.is_file() else []
        self.found: dict[tuple[str, str], dict[str, Any]] = {(r["part"], r["name"]): r for r in map(json.loads, lines)}
        self._limit, self._began, self._only = limit, time.monotonic(), only

    def profile_path(self, name: str) -> Path:
        return self._path.with_name(f"profile-{name}.txt")

    def begin_part(self) -> None:
        self._began = time.monotonic()

    def take(self, part: str, name: str, measure: Callable[[], Numbers]) -> None:
        """Measure, unless it is known or time is up; whatever fails is noted, and the next one is measured."""
        known = self.found.get((part, name))
        if known is not None and "why" not in known:
            return
        if self._only and name not in self._only:
            return
        if time.monotonic() - self._began > self._limit:
            print(f"{part} | {name}: left for another call, the part has had its time", flush=True)
            return
        began = time.monotonic()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                result: dict[str, Any] = measure()
        except Exception as error:  # of a peer, a driver, a compiler: the others are measured all the same
            words = (str(error).strip().splitlines() or [""])[0]
            result = {"why": f"{type(error).__name__}: {words[:160]}"}
        result |= {"part": part, "name": name, "took": round(time.monotonic() - began, 1)}
        self.found[part, name] = result
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(result) + "\n")
        print(f"{part} | {name}: { {k: v for k, v in result.items() if k not in ('part', 'name')} }", flush=True)
        clean()

    def of(self, part: str) -> dict[str, dict[str, Any]]:
        return {name: result for (one, name), result in self.found.items() if one == part}

    def number(self, part: str, name: str, key: str) -> float:
        """NaN where it was not measured."""
        return float(self.found.get((part, name), {}).get(key, math.nan))


def clean() -> None:
    """Give freed memory back."""
    gc.collect()
    if CUDA:
        torch.cuda.empty_cache()


def wait() -> None:
    if CUDA:
        torch.cuda.synchronize()


def peak_mib(base: int = 0) -> float:
    return (torch.cuda.max_memory_allocated() - base) / 2**20 if CUDA else 0.0


def profiled(step: Callable[[], None], path: Path, count: int) -> float:
    """The share of time in which the GPU computes; the dearest operators go to a file."""
    from torch.profiler import ProfilerActivity, profile

    kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if CUDA else [])]
    wait()
    began = time.perf_counter()
    with profile(activities=kinds) as seen:
        for _ in range(count):
            step()
        wait()
    seconds = time.perf_counter() - began
    key = "self_device_time_total" if CUDA else "self_cpu_time_total"
    averages = seen.key_averages()
    path.write_text(averages.table(sort_by=key, row_limit=25, max_name_column_width=80), encoding="utf-8")
    if not CUDA:
        return math.nan
    kernels = [e for e in seen.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    return sum(e.self_device_time_total for e in kernels) / 1e6 / seconds


class Clock:
    """Seconds a step, from the end of the `warm`th step on, with one wait at each end; and the peak of memory."""

    def __init__(self, warm: int) -> None:
        self._warm, self.steps, self.base = warm, 0, 0
        self._began = self._ended = 0.0

    def start(self) -> None:
        if CUDA:
            wait()
            torch.cuda.reset_peak_memory_stats()
            self.base = torch.cuda.memory_allocated()

    def step(self) -> None:
        self.steps += 1
        if self.steps == self._warm:
            wait()
            self._began = time.perf_counter()

    def stop(self) -> None:
        wait()
        self._ended = time.perf_counter()

    def numbers(self, tokens: float) -> Numbers:
        """`tokens` of responses a step."""
        seconds = (self._ended - self._began) / max(1, self.steps - self._warm)
        return {"seconds": seconds, "tokens": tokens / seconds if seconds else 0.0, "mib": peak_mib(self.base)}


def configs(shapes: str) -> tuple[Any, Any]:
    """Of student and teacher."""
    from transformers import GPT2Config, LlamaConfig, Qwen2Config

    if shapes == "small":  # those of SmolLM2-135M, the student with half of its layers
        student, teacher = (
            LlamaConfig(
                vocab_size=49152,
                hidden_size=576,
                intermediate_size=1536,
                num_hidden_layers=n,
                num_attention_heads=9,
                num_key_value_heads=3,
                tie_word_embeddings=True,
            )
            for n in (15, 30)
        )
        return student, teacher

    gpt2 = {
        "gpt2": ((24, 1024, 16), (48, 1600, 25)),
        "runs": ((12, 768, 12), (48, 1600, 25)),
        "tiny": ((1, 16, 2), (1, 24, 2)),
    }
    if shapes in gpt2:
        off = {"attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0}
        off |= {"vocab_size": 512, "bos_token_id": 511, "eos_token_id": 511} if shapes == "tiny" else {}
        student, teacher = (GPT2Config(n_layer=n, n_embd=w, n_head=h, **off) for n, w, h in gpt2[shapes])
        return student, teacher
    student, teacher = (
        Qwen2Config(
            vocab_size=151936,
            hidden_size=width,
            intermediate_size=inner,
            num_hidden_layers=n,
            num_attention_heads=heads,
            num_key_value_heads=2,
            tie_word_embeddings=True,
        )
        for n, width, heads, inner in ((24, 896, 14, 4864), (28, 1536, 12, 8960))
    )
    return student, teacher


def models(shapes: str) -> tuple[Any, Any]:
    """A float32 student, and a teacher as a run loads it: in bf16 on a GPU."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    with DEVICE:
        student, teacher = (AutoModelForCausalLM.from_config(config) for config in configs(shapes))
    teacher = teacher.to(torch.bfloat16) if CUDA else teacher
    return student.train(), teacher.eval().requires_grad_(False)
