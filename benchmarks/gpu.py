"""One step on a GPU, in bf16: dpkd against TRL's Triton kernels, Liger, plain code and the floor.

GPT-2 shapes (student 24 x 1024, teacher 48 x 1600: medium and XL) and Qwen-like ones (24 x 896 and 28 x 1536,
vocabulary 151,936), from configurations with random weights; 8 rows of up to 512 tokens, half of them prompt. Weights
are float32 and every variant runs under autocast. Time is a median over repeats, peak memory the allocator's above the
models; tokens are those of responses.

    python benchmarks/gpu.py [--repeats 10] [--shapes gpt2 qwen] [--tiny]     # --tiny runs anywhere, in seconds
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import peers
import torch
from harness import machine, markdown
from ours import engine_step
from shapes import sequences

__all__ = ["table"]

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
COMPILER = "inductor" if CUDA else "eager"  # a CPU may have no C++ compiler; eager still traces


def configs(shapes: str) -> tuple[Any, Any]:
    """Of student and teacher."""
    from transformers import GPT2Config, Qwen2Config

    if shapes == "gpt2":
        sizes = ((24, 1024, 16), (48, 1600, 25))
        off = {"attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0}
        student, teacher = (GPT2Config(n_layer=n, n_embd=width, n_head=heads, **off) for n, width, heads in sizes)
        return student, teacher
    large = shapes == "qwen"
    sizes = ((24, 896, 14, 4864), (28, 1536, 12, 8960)) if large else ((1, 32, 2, 64), (2, 48, 2, 96))
    student, teacher = (
        Qwen2Config(
            vocab_size=151936 if large else 512,
            hidden_size=width,
            intermediate_size=inner,
            num_hidden_layers=n,
            num_attention_heads=heads,
            num_key_value_heads=2,
            tie_word_embeddings=True,
        )
        for n, width, heads, inner in sizes
    )
    return student, teacher


def variants(shapes: str) -> dict[str, Callable[[], peers.Step]]:
    """Name → what makes the step; all share the models, and each drops the gradients of the one before."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    student, teacher = (AutoModelForCausalLM.from_config(config).to(DEVICE) for config in configs(shapes))
    models = student.train(), teacher.eval().requires_grad_(False)
    vocabulary, tiny = student.config.vocab_size, shapes == "tiny"
    rows = sequences(2, (4, 8), (4, 8), vocabulary) if tiny else sequences(8, (192, 256), (64, 256), vocabulary)
    pairs = [row._replace(prompt_ids=rows[i - i % 2].prompt_ids) for i, row in enumerate(rows)]
    pad = vocabulary - 1
    batch = peers.Padded(*(part.to(DEVICE) for part in peers.padded(rows, 16 if tiny else 512, pad)))

    def ours(name: str, compiled: str | None = None) -> Callable[[], peers.Step]:
        chosen = pairs if name == "dpkd" else rows
        return lambda: engine_step(name, models, chosen, bf16=True, compiled=compiled)

    return {
        "released shape, KL": lambda: peers.released("kl", models, batch),
        "TRL generalized_jsd_loss, JSD": lambda: peers.trl(models, batch, 0.5),
        "TRL chunked divergence (Triton on a GPU), JSD": lambda: peers.trl_chunked(models, batch, 0.5),
        "TRL chunked divergence (Triton on a GPU), forward KL": lambda: peers.trl_chunked(models, batch, 0.0),
        "Liger chunked JSD": lambda: peers.liger(models, rows, pad),
        "response only, dense, JSD": lambda: peers.dense("jsd", models, rows, pad),
        "backbones alone (floor)": lambda: peers.backbones(models, rows, pad),
        "dpkd: fkl": ours("fkl"),
        "dpkd: fkl, compiled chunks": ours("fkl", COMPILER),
        "dpkd: jsd": ours("jsd"),
        "dpkd: jsd, compiled chunks": ours("jsd", COMPILER),
        "dpkd: dpkd-token": ours("dpkd-token"),
        "dpkd: dpkd pairs": ours("dpkd"),
    }


def measure(step: peers.Step, repeats: int) -> tuple[float, float]:
    """Median seconds, and MiB of the allocator's peak over what was there before."""

    def once() -> float:
        began = time.perf_counter()
        with torch.autocast(DEVICE.type, torch.bfloat16):
            step()
        if CUDA:
            torch.cuda.synchronize()
        return time.perf_counter() - began

    once(), once()  # compilers and caches
    before = 0
    if CUDA:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    taken = [once() for _ in range(repeats)]
    peak = torch.cuda.max_memory_allocated() - before if CUDA else 0
    return statistics.median(taken), peak / 2**20


def table(shapes: str, repeats: int) -> str:
    rows, base = [], 0.0
    for name, make in variants(shapes).items():
        try:
            seconds, mib = measure(make(), repeats)
        except (ImportError, torch.OutOfMemoryError) as error:
            rows.append([name, f"not measured: {str(error).splitlines()[0]}", "–", "–"])
            continue
        base = base or seconds
        rows.append([name, f"{1000 * seconds:,.1f}", f"{seconds / base:.2f}", f"{mib:,.0f}"])
    return markdown(["variant", "ms", "of the first", "peak over the models, MiB"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--shapes", nargs="+", choices=["gpt2", "qwen"], default=["gpt2", "qwen"])
    parser.add_argument("--tiny", action="store_true", help="small shapes, on a CPU too: to see that it runs")
    arguments = parser.parse_args()
    if not (CUDA or arguments.tiny):
        raise SystemExit("no GPU: use --tiny to see that the script runs")
    print(torch.cuda.get_device_name() if CUDA else "no GPU", machine(), sep=", ")
    for shapes in ["tiny"] if arguments.tiny else arguments.shapes:
        print(f"\n### {shapes}\n\n{table(shapes, 1 if arguments.tiny else arguments.repeats)}")


if __name__ == "__main__":
    main()
