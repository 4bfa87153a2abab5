"""Tokens per second of `dpkd.rollout.sampling.sample` against plain batched `generate` of transformers.

Both answer the same prompts of mixed length with the same models, in batches of the same size, temperature 1.
`generate` gets the prompts in the order of the data, left-padded, as usual. Where responses end early, some
ids act as EOS, so that lengths differ with random weights too. Each ratio is the median over repeats in one
process.

    python benchmarks/sampling.py [--model FOLDER]
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from pathlib import Path

import torch
from harness import markdown
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig
from transformers.utils import logging

from dpkd.api import SamplingSettings
from dpkd.rollout.sampling import sample

PROMPTS, BATCH, NEW, REPEATS = 48, 16, 64, 2
EOS_SHARE = 1 / 32  # of the vocabulary, where responses end early


def models(folder: str | None) -> dict[str, torch.nn.Module]:
    gpt2 = GPT2Config(vocab_size=50257, n_embd=256, n_layer=4, n_head=4, bos_token_id=0, eos_token_id=0)
    llama = LlamaConfig(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=172,
        num_hidden_layers=5,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=512,
    )
    found = {
        "GPT-2 4x256": AutoModelForCausalLM.from_config(gpt2),
        "Llama 5x64": AutoModelForCausalLM.from_config(llama),
    }
    if folder is not None:
        found[folder] = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return {name: model.eval() for name, model in found.items()}


def with_generate(model: torch.nn.Module, prompts: list[list[int]], eos: list[int]) -> int:
    """New tokens drawn by `generate`, EOS included, padding not."""
    tokens = 0
    for start in range(0, len(prompts), BATCH):
        batch = prompts[start : start + BATCH]
        width = max(map(len, batch))
        ids = torch.tensor([[0] * (width - len(one)) + one for one in batch])
        mask = torch.tensor([[0] * (width - len(one)) + [1] * len(one) for one in batch])
        out = model.generate(
            input_ids=ids,
            attention_mask=mask,
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            max_new_tokens=NEW,
            eos_token_id=eos,
            pad_token_id=0,
        )
        for row in out[:, width:]:
            ends = torch.isin(row, torch.tensor(eos)).nonzero()
            tokens += int(ends[0]) + 1 if len(ends) else len(row)
    return tokens


def with_sample(model: torch.nn.Module, prompts: list[list[int]], eos: list[int], seed: int) -> int:
    settings = SamplingSettings(max_new_tokens=NEW, batch_size=BATCH)
    seeds = range(seed * len(prompts), (seed + 1) * len(prompts))
    drawn = sample(model, prompts, settings, eos_ids=eos, pad_id=0, seeds=seeds)
    return sum(len(one.response_ids) for one in drawn)


def measured(model: torch.nn.Module, prompts: list[list[int]], eos: list[int], repeats: int) -> dict[str, list[float]]:
    """Tokens per second of each repeat, the two ways by turns."""
    with_generate(model, prompts[:BATCH], eos)
    with_sample(model, prompts[:BATCH], eos, 0)
    rates: dict[str, list[float]] = {"generate": [], "sample": []}
    for repeat in range(repeats):
        for who in rates:
            start = time.perf_counter()
            if who == "generate":
                tokens = with_generate(model, prompts, eos)
            else:
                tokens = with_sample(model, prompts, eos, repeat + 1)
            rates[who].append(tokens / (time.perf_counter() - start))
    return rates


def table(repeats: int = REPEATS, folder: str | None = None, tiny: bool = False) -> str:
    """Tokens per second of both, by model and by where responses end."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.manual_seed(0)
    chance, rows = random.Random(0), []
    for name, model in models(folder).items():
        if tiny and model.config.vocab_size > 1000:
            continue
        ids = range(3, model.config.vocab_size)
        prompts = [chance.choices(ids, k=chance.randint(8, 120)) for _ in range(4 if tiny else PROMPTS)]
        for ends, eos in (("at the limit", [2]), ("early, at EOS", chance.sample(ids, int(len(ids) * EOS_SHARE)))):
            rates = measured(model, prompts, eos, repeats)
            ratio = statistics.median(b / a for a, b in zip(rates["generate"], rates["sample"], strict=True))
            speeds = [f"{statistics.median(rates[who]):,.0f}" for who in ("generate", "sample")]
            rows.append([Path(name).name, ends, *speeds, f"{ratio:.2f}"])
    return markdown(["model", "responses end", "generate, tokens/s", "dpkd, tokens/s", "ratio"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="folder of a model to measure too")
    parser.add_argument("--repeats", type=int, default=REPEATS)
    arguments = parser.parse_args()
    print(table(arguments.repeats, arguments.model))


if __name__ == "__main__":
    main()
