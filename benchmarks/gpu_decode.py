"""Decoding on a GPU: dpkd, `generate`, and the floor of a step in a CUDA graph, in tokens per second."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from gpu_tools import CUDA, DEVICE, Book, Numbers, configs, profiled, wait
from shapes import sequences


def part_decode(book: Book, tiny: bool) -> None:
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.set_verbosity_error()
    torch.manual_seed(0)
    with DEVICE:
        model = AutoModelForCausalLM.from_config(configs("tiny" if tiny else "runs")[0])
    model = model.to(torch.bfloat16 if CUDA else torch.float32).eval()
    vocabulary, new = model.config.vocab_size, 4 if tiny else 128
    for rows in [2] if tiny else [32, 256]:
        part = f"decode {rows}"
        prompts = [list(s.prompt_ids) for s in sequences(rows, (4, 8) if tiny else (32, 128), (2, 2), vocabulary)]
        # The floor first: others are measured against it.
        ways: dict[str, Callable[[], float]] = {
            "CUDA graph of one step (floor)": partial(graph_floor, model, prompts, new),
            "dpkd": partial(decode_ours, model, prompts, new, "auto"),
            "dpkd, eager": partial(decode_ours, model, prompts, new, "eager"),
            "generate": partial(decode_generate, model, prompts, new, None),
            "generate, static cache": partial(decode_generate, model, prompts, new, "static"),
        }
        for name, way in ways.items():
            book.take(part, name, lambda way=way, rows=rows: _rate(way(), rows, new))
        path = book.profile_path(f"decode-{rows}")
        book.take(part, "profile", partial(_profile, model, prompts, new, path))


def _rate(seconds: float, rows: int, new: int) -> Numbers:
    return {"ms": 1000 * seconds / new, "tokens": rows * new / seconds}


def _profile(model: Any, prompts: list[list[int]], new: int, path: Path) -> Numbers:
    """The share of time in which the GPU computes while dpkd draws; the dearest operators go to a file."""
    from dpkd.models.fused_layers import fuse_layers, unfuse_layers

    fuse_layers(model)
    draw = _drawing(model, prompts, new, "auto")
    draw()
    busy = profiled(draw, path, 1)
    unfuse_layers(model)
    return {"busy": busy}


def _best(once: Callable[[], Any], warm: int = 1, repeats: int = 2) -> float:
    """The fastest of some calls, in seconds, after others."""
    for _ in range(warm if CUDA else 0):
        once()
    taken = []
    for _ in range(repeats if CUDA else 1):
        wait()
        began = time.perf_counter()
        once()
        wait()
        taken.append(time.perf_counter() - began)
    return min(taken)


def _drawing(model: Any, prompts: list[list[int]], new: int, decoding: Any) -> Callable[[], Any]:
    """Draws a response to each prompt, of `new` tokens at most."""
    from dpkd.api.sources import SamplingSettings
    from dpkd.rollout.sampling import Decoder

    eos = model.config.vocab_size - 1
    decoder = Decoder(model, eos_ids=frozenset({eos}), pad_id=eos, vocabulary=None, decoding=decoding)
    settings = SamplingSettings(max_new_tokens=new, batch_size=len(prompts))
    return lambda: decoder.draw(prompts, settings, seeds=list(range(len(prompts))))


def decode_ours(model: Any, prompts: list[list[int]], new: int, decoding: Any) -> float:
    from dpkd.models.fused_layers import fuse_layers, unfuse_layers

    fuse_layers(model)  # as a run and `dpkd sample` do
    seconds = _best(_drawing(model, prompts, new, decoding))
    unfuse_layers(model)
    return seconds


@torch.no_grad()
def decode_generate(model: Any, prompts: list[list[int]], new: int, cache: str | None) -> float:
    eos, width = model.config.vocab_size - 1, max(map(len, prompts))
    ids = torch.tensor([[eos] * (width - len(one)) + one for one in prompts], device=DEVICE)
    mask = torch.tensor([[0] * (width - len(one)) + [1] * len(one) for one in prompts], device=DEVICE)
    how = {} if cache is None else {"cache_implementation": cache}
    return _best(
        lambda: model.generate(
            input_ids=ids,
            attention_mask=mask,
            do_sample=True,
            top_k=0,
            max_new_tokens=new,
            min_new_tokens=new,
            eos_token_id=eos,
            pad_token_id=eos,
            **how,
        ),
        warm=2 if cache else 1,
    )


@torch.no_grad()
def graph_floor(model: Any, prompts: list[list[int]], new: int) -> float:
    """`new` replays of one decoding step over a static cache, the draw included: the floor of eager kernels."""
    from transformers import StaticCache

    if not CUDA:
        raise RuntimeError("no GPU")
    width, rows = max(map(len, prompts)), len(prompts)
    cache = StaticCache(
        config=model.config, max_cache_len=width + new + 4
    )  # two steps before, one while it is captured
    token = torch.zeros(rows, 1, dtype=torch.long, device=DEVICE)
    model(token.expand(rows, width).contiguous(), past_key_values=cache, use_cache=True)
    mask = torch.ones(rows, 1, 1, width + new + 4, dtype=torch.bool, device=DEVICE)
    position = torch.full((rows, 1), width, dtype=torch.long, device=DEVICE)

    def one() -> None:
        output = model(
            token, past_key_values=cache, attention_mask=mask, position_ids=position, use_cache=True, logits_to_keep=1
        )
        logits = output.logits[:, -1].float()
        noise = torch.rand_like(logits).log_().neg_()
        token.copy_((logits.softmax(-1) / noise).argmax(-1, keepdim=True))

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            one()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        one()

    def replays() -> None:
        for layer in cache.layers:  # each replay moves on by a column: begin behind the prompt again
            layer.cumulative_length.fill_(width)
        for _ in range(new):
            graph.replay()

    return _best(replays)
