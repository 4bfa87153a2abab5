"""Drawing text on a GPU: `dpkd.rollout.sampling` against `generate` and against the floor of a CUDA graph.

GPT-2 12x768 with random weights in bfloat16, prompts of 32 to 128 tokens, 128 new tokens each, temperature 1. The floor
is one forward of one token per row over a static cache in a CUDA graph, without any draw. A way that fails is a line
that says why; the others go on. Needs no network and no data.

    python benchmarks/decoding.py [--tiny] [--rows 32 256]
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from harness import markdown
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GPT2Config, StaticCache
from transformers.utils import logging

from dpkd.api import GenerationModel, SamplerConfig, SamplingSettings, SamplingTask
from dpkd.rollout.backends.hf import HfSampler
from dpkd.rollout.sampling import Decoder
from dpkd.rollout.token_sampling import draw

REPEATS = 3


@dataclass(frozen=True)
class Shape:
    """What is drawn."""

    config: GPT2Config
    shortest: int
    longest: int
    new: int

    def prompts(self, rows: int) -> list[list[int]]:
        """Random prompts, the first of them as long as they get."""
        chance = random.Random(rows)
        lengths = [self.longest, *(chance.randint(self.shortest, self.longest) for _ in range(rows - 1))]
        return [chance.choices(range(1, self.config.vocab_size), k=length) for length in lengths]


def shape_of(tiny: bool) -> Shape:
    ends = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    if tiny:
        return Shape(GPT2Config(vocab_size=101, n_embd=32, n_layer=2, n_head=2, n_positions=64, **ends), 3, 12, 20)
    return Shape(GPT2Config(n_embd=768, n_layer=12, n_head=12, **ends), 32, 128, 128)


def wait(device: torch.device) -> None:
    """Until the device has done everything."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(work: Callable[[], Any], device: torch.device, repeats: int = REPEATS) -> float:
    """Median time of a piece of work."""
    taken = []
    for _ in range(repeats):
        wait(device)
        began = time.perf_counter()
        work()
        wait(device)
        taken.append(time.perf_counter() - began)
    return statistics.median(taken)


def as_graph(step: Callable[[], Any], device: torch.device) -> Callable[[], Any]:
    """A step that can be run again and again; on CUDA as a captured graph."""
    for _ in range(3):
        step()
    if device.type != "cuda":
        return step
    wait(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


@torch.no_grad()
def floor(model: Any, shape: Shape, rows: int, device: torch.device) -> float:
    """Seconds of a forward of one token per row over a full static cache: no draw, no mask to make, no growth."""
    columns = shape.longest + shape.new
    cache = StaticCache(config=model.config, max_cache_len=columns)
    prompt = torch.ones(rows, shape.longest, dtype=torch.long, device=device)
    model(input_ids=prompt, past_key_values=cache, use_cache=True, logits_to_keep=1)
    token = torch.ones(rows, 1, dtype=torch.long, device=device)
    position = torch.full((rows, 1), shape.longest, device=device)
    bias = torch.zeros(rows, 1, 1, columns, dtype=model.dtype, device=device)

    def step() -> Tensor:
        for layer in cache.layers:
            layer.cumulative_length.fill_(shape.longest)
        output = model(
            input_ids=token, attention_mask=bias, position_ids=position, past_key_values=cache, use_cache=True
        )
        return output.logits  # type: ignore[no-any-return]

    replay = as_graph(step, device)
    return seconds(lambda: [replay() for _ in range(20)], device) / 20


@torch.no_grad()
def drawing(shape: Shape, rows: int, device: torch.device, **changes: float) -> float:
    """Seconds of the draw alone."""
    logits = torch.randn(rows, shape.config.vocab_size, device=device, dtype=torch.bfloat16)
    uniforms = torch.rand(rows, dtype=torch.float64, device=device)
    settings = SamplingSettings(**changes)
    replay = as_graph(lambda: draw(logits, uniforms, settings, static=True), device)
    return seconds(lambda: [replay() for _ in range(20)], device) / 20


def generated(model: Any, shape: Shape, rows: int, device: torch.device, **more: Any) -> Callable[[], Any]:
    """`generate` over left-padded prompts."""
    prompts = shape.prompts(rows)
    ids = torch.tensor([[0] * (shape.longest - len(one)) + one for one in prompts], device=device)
    mask = (
        torch.arange(shape.longest, device=device)
        >= shape.longest - torch.tensor([len(p) for p in prompts], device=device)[:, None]
    ).long()
    return lambda: model.generate(
        input_ids=ids,
        attention_mask=mask,
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        max_new_tokens=shape.new,
        min_new_tokens=shape.new,
        pad_token_id=0,
        **more,
    )


def drawn(decoder: Decoder, shape: Shape, rows: int, **changes: float) -> Callable[[], Any]:
    """Our own over the same prompts."""
    settings, prompts = SamplingSettings(max_new_tokens=shape.new, batch_size=rows, **changes), shape.prompts(rows)
    return lambda: decoder.draw(prompts, settings, seeds=range(rows))


def host_waits(work: Callable[[], Any], device: torch.device) -> str:
    """How often a piece of work makes the host wait for the GPU, as torch counts it."""
    if device.type != "cuda":
        return "-"
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            work()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return str(sum("synchroniz" in str(one.message) for one in found))


def agreement(model: nn.Module, shape: Shape, rows: int) -> str:
    """Whether `auto` keeps its graphs, and how far their log-probs are from those of the eager path."""
    made = {way: Decoder(model, eos_ids=(), pad_id=0, decoding=way) for way in ("auto", "graph", "eager")}
    found = {way: drawn(decoder, shape, rows)() for way, decoder in made.items()}
    same = sum(a.response_ids == b.response_ids for a, b in zip(found["graph"], found["eager"], strict=True))
    gaps = [
        (a.logps[:k] - b.logps[:k]).abs().mean().item()
        for a, b in zip(found["graph"], found["eager"], strict=True)
        if (
            k := next(
                (i for i, (x, y) in enumerate(zip(a.response_ids, b.response_ids, strict=True)) if x != y), shape.new
            )
        )
    ]
    kept = {way: decoder._static for way, decoder in made.items()}
    return (
        f"{rows} rows: static shapes in use: auto {kept['auto']}, graph {kept['graph']}; {same} of {rows} responses as "
        f"eagerly, log-probs before the first other token {max(gaps, default=0.0):.1e} nats apart (largest mean)"
    )


def decode_part(device: torch.device | str, tiny: bool = False, rows: tuple[int, ...] = (32, 256)) -> str:
    """The table of one device, and what there is to say about it."""
    device = torch.device(device)
    logging.set_verbosity_error()
    shape = shape_of(tiny)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(shape.config).to(device, torch.bfloat16).eval()
    lines, notes = [], []
    for count in (4,) if tiny else rows:
        least = floor(model, shape, count, device)
        ways: dict[str, Callable[[], Any]] = {
            "dpkd graph": drawn(Decoder(model, eos_ids=(), pad_id=0, decoding="graph"), shape, count),
            "dpkd graph, top-p 0.9": drawn(
                Decoder(model, eos_ids=(), pad_id=0, decoding="graph"), shape, count, top_p=0.9
            ),
            "dpkd eager": drawn(Decoder(model, eos_ids=(), pad_id=0, decoding="eager"), shape, count),
            "generate": generated(model, shape, count, device),
        }
        if device.type == "cuda" and count == rows[0]:
            ways["generate, static, compiled"] = generated(model, shape, count, device, cache_implementation="static")
        lines.append(
            [str(count), "floor (forward only)", "", f"{least * 1e3:.2f}", f"{count / least:,.0f}", "1.00", ""]
        )
        for name, way in ways.items():
            try:
                first = seconds(way, device, 1)
                taken = seconds(way, device, 1 if first > 20 else REPEATS)
                waits = host_waits(way, device) if name.startswith("dpkd") else ""
            except Exception as reason:  # the other ways are still worth their numbers
                notes.append(f"{name}, {count} rows: {type(reason).__name__}: {str(reason).splitlines()[:1]}")
                continue
            step = taken / shape.new
            lines.append(
                [
                    str(count),
                    name,
                    f"{first:.2f}",
                    f"{step * 1e3:.2f}",
                    f"{count / step:,.0f}",
                    f"{step / least:.2f}",
                    waits,
                ]
            )
        alone = [drawing(shape, count, device, **changes) * 1e3 for changes in ({}, {"top_p": 0.9}, {"top_k": 50})]
        notes.append(
            f"{count} rows: the draw alone {alone[0]:.3f} ms, top-p {alone[1]:.3f} ms, top-k {alone[2]:.3f} ms"
        )
        notes.append(agreement(model, shape, count))
    notes.append(copied(shape, device, 4 if tiny else rows[0]))
    heads = ["rows", "way", "first call, s", "ms/token step", "tokens/s", "of the floor", "host waits"]
    return markdown(heads, lines) + "\n\n" + "\n".join(f"- {note}" for note in notes)


def copied(shape: Shape, device: torch.device, rows: int) -> str:
    """The sampler of a run with a float32 student: what a copy of the weights costs, and what it gives."""
    model = AutoModelForCausalLM.from_config(shape.config).to(device).eval()
    sampler = HfSampler(GenerationModel(model, None, frozenset(), 0), SamplerConfig())
    task = SamplingTask(shape.prompts(rows), range(rows), max_new_tokens=shape.new, batch_size=rows)
    sampler.draw(task)
    refresh, step = seconds(sampler.refresh, device), seconds(lambda: sampler.draw(task), device) / shape.new
    return (
        f"{rows} rows, float32 student, drawn from a bfloat16 copy: {sampler._copy is not None}; refresh "
        f"{refresh * 1e3:.2f} ms, {step * 1e3:.2f} ms per token step"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="shapes for a test")
    parser.add_argument("--rows", type=int, nargs="+", default=[32, 256])
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and not arguments.tiny:
        raise SystemExit("no GPU is to be had here: only --tiny is worth running")
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    print(f"Drawing text, {name}, torch {torch.__version__}\n")
    print(decode_part(device, arguments.tiny, tuple(arguments.rows)))


if __name__ == "__main__":
    main()
