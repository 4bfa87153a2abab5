"""What a GPU makes of dpkd, in bf16: steps, whole runs, decoding, and how busy it is, beside peers and floors.

    python benchmarks/gpu.py --out FOLDER [--part check step runs small decode mfu] [--limit SECONDS] [--tiny]

Models come from configurations with random weights: no hub, no shared folder; TRL and Liger are measured where they are
installed. Each part stops after --limit seconds (150). What is measured goes to FOLDER/gpu.jsonl line by line; a second
call goes on with what is missing. The tables, the ratios and the verdict on the targets are printed at the end of every
call from all lines there. `--tiny` runs every part on a CPU, to see that it runs.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peers
import torch
from gpu_checks import part_check
from gpu_decode import part_decode
from gpu_runs import part_runs, part_small
from gpu_tools import CUDA, DEVICE, Book, Numbers, clean, models, peak_mib, profiled, wait
from harness import machine, markdown
from ours import engine_step, usual_layout
from shapes import sequences

from dpkd.models.captured import capture, captured, release
from dpkd.models.fused_layers import fuse_layers, unfuse_layers
from dpkd.models.head import causal_lm

COMPILER = "inductor" if CUDA else "eager"  # a CPU may have no C++ compiler; eager still traces
IN_A_ROW = 4 if CUDA else 1  # steps between two waits
PEAK = 989e12  # bf16 operations a second of an H100 or H200, from its data sheet


# --- the step


Pair = tuple[Any, Any]


def step_variants(pair: Pair, rows: int, tiny: bool) -> dict[str, Callable[[], peers.Step]]:
    """Name → what makes the step; all share the models, and each drops the gradients of the one before.

    What a run does by default comes first: its passes are CUDA graphs. Ours and the backbones alone have the fused
    layers of a run, others the models of transformers as they are.
    """
    vocabulary = pair[0].config.vocab_size
    many = sequences(2, (4, 8), (4, 8), vocabulary) if tiny else sequences(rows, (192, 256), (64, 256), vocabulary)
    pairs = [row._replace(prompt_ids=many[i - i % 2].prompt_ids) for i, row in enumerate(many)]
    pad = vocabulary - 1
    batch = peers.Padded(*(part.to(DEVICE) for part in peers.padded(many, 16 if tiny else 512, pad)))

    def ours(name: str, ready: Callable[[Pair], Pair] = _plain, **how: Any) -> Callable[[], peers.Step]:
        return lambda: engine_step(name, ready(_fused(pair)), pairs if name == "dpkd" else many, bf16=True, **how)

    def theirs(make: Callable[[Pair], peers.Step]) -> Callable[[], peers.Step]:
        return lambda: make(_unfused(_plain(pair)))

    def floor(ready: Callable[[Pair], Pair] = _plain) -> Callable[[], peers.Step]:
        """Both backbones, in the layout of dpkd's own step."""
        return lambda: peers.backbones(ready(_fused(pair)), many, pad, usual_layout(DEVICE, bf16=True))

    first = {
        "backbones alone, CUDA graphs": floor(_recorded),
        "dpkd fkl, CUDA graphs": ours("fkl", _recorded),
        "dpkd jsd, CUDA graphs": ours("jsd", _recorded),
        "TRL chunked, JSD": theirs(lambda pair: peers.trl_chunked(pair, batch, 0.5)),
        "TRL chunked, forward KL": theirs(lambda pair: peers.trl_chunked(pair, batch, 0.0)),
        "dpkd akl, CUDA graphs": ours("akl", _recorded),
        "dpkd pairs, CUDA graphs": ours("dpkd", _recorded),
        "response only, dense, JSD": theirs(lambda pair: peers.dense("jsd", pair, many, pad)),
        "backbones alone": floor(),
        "dpkd fkl": ours("fkl"),
        "dpkd jsd": ours("jsd"),
    }
    if rows > 8:
        return first
    return {
        **first,
        "backbones alone, rows padded": lambda: peers.backbones(_plain(_fused(pair)), many, pad),
        "dpkd akl": ours("akl"),
        "dpkd pairs": ours("dpkd"),
        "dpkd dpkd-token": ours("dpkd-token"),
        "dpkd jsd, without kernels": ours("jsd", kernels=False),
        "dpkd jsd, chunk of 32 MiB": ours("jsd", chunk_mib=32.0, kernels=False),
        "dpkd jsd, chunk of 512 MiB": ours("jsd", chunk_mib=512.0),
        "dpkd jsd, loss compiled": ours("jsd", compiled=COMPILER, kernels=False),
        "Liger chunked JSD": theirs(lambda pair: peers.liger(pair, many, pad)),
        "released shape, KL": theirs(lambda pair: peers.released("kl", pair, batch)),
        "TRL generalized_jsd_loss": theirs(lambda pair: peers.trl(pair, batch, 0.5)),
        # Blocks stay compiled from here on.
        "backbones alone, blocks compiled": floor(_compiled),
        "dpkd fkl, blocks compiled": ours("fkl"),
        "dpkd jsd, blocks compiled": ours("jsd"),
        "backbones alone, blocks compiled, CUDA graphs": floor(_recorded),
        "dpkd jsd, blocks compiled, CUDA graphs": ours("jsd", _recorded),
    }


def _fused(pair: Pair) -> Pair:
    for model in pair:
        fuse_layers(model)
    return pair


def _unfused(pair: Pair) -> Pair:
    for model in pair:
        unfuse_layers(model)
    return pair


def _plain(pair: Pair) -> Pair:
    for model in pair:
        release(causal_lm(model))
    return pair


def _recorded(pair: Pair) -> Pair:
    """Nothing happens on a CPU, which has no CUDA graphs."""
    for model in pair if CUDA else ():
        if captured(causal_lm(model).base_model) is None:
            capture(causal_lm(model), lambda line: print(line, file=sys.stderr))
    return pair


def _compiled(pair: Pair) -> Pair:
    from dpkd.models.compile import compile_blocks

    for model in _plain(pair):
        compile_blocks(model, backend=COMPILER)
    return pair


def measure_step(make: Callable[[], peers.Step], repeats: int) -> Numbers:
    """Milliseconds a step, some in a row as in a run, and MiB of the allocator's peak over what was there before."""
    step = make()

    def once(count: int = IN_A_ROW) -> float:
        wait()
        began = time.perf_counter()
        for _ in range(count):
            with torch.autocast(DEVICE.type, torch.bfloat16):
                step()
        wait()
        return (time.perf_counter() - began) / count

    once(3 if CUDA else 1)  # compilers and caches
    base = 0
    if CUDA:
        torch.cuda.reset_peak_memory_stats()
        base = torch.cuda.memory_allocated()
    taken = [once() for _ in range(repeats)]
    return {"ms": 1000 * statistics.median(taken), "fastest": 1000 * min(taken), "mib": peak_mib(base)}


def part_step(book: Book, tiny: bool) -> None:
    for shapes, rows in [("tiny", 8)] if tiny else [("gpt2", 8), ("qwen", 8), ("qwen", 32), ("gpt2", 32)]:
        part = f"step {shapes} {rows}"
        pair = models(shapes)
        for name, make in step_variants(pair, rows, tiny).items():
            book.take(part, name, lambda make=make: measure_step(make, 1 if tiny else 5))
            pair[0].zero_grad(set_to_none=True)
        del pair
        clean()


# --- how busy the GPU is


def part_mfu(book: Book, tiny: bool) -> None:
    """The share of the data sheet's arithmetic in a whole off-policy step with its update, and a profile of it."""
    for shapes in ["tiny"] if tiny else ["runs", "qwen"]:
        pair = _fused(models(shapes))
        for name in (shapes, f"{shapes}, CUDA graphs", f"{shapes}, compiled, CUDA graphs"):
            if "compiled" in name:
                _compiled(pair)
            if name != shapes:
                _recorded(pair)
            path = book.profile_path(name.replace(", ", "-").replace(" ", "-"))
            book.take("mfu", name, lambda pair=pair, path=path: mfu("jsd", pair, path, tiny))
            if name == "runs, CUDA graphs":
                path = book.profile_path("pairs-CUDA-graphs")
                book.take("mfu", "pairs, CUDA graphs", lambda pair=pair, path=path: mfu("dpkd", pair, path, tiny))
        del pair
        clean()


def mfu(loss: str, pair: tuple[Any, Any], profile: Path, tiny: bool) -> Numbers:
    """Of 32 rows, or 32 pairs."""
    vocabulary = pair[0].config.vocab_size
    rows, prompts = (64, (64, 192)) if loss == "dpkd" else (32, (192, 256))  # those of pairs as in whole runs
    many = sequences(2, (4, 8), (4, 8), vocabulary) if tiny else sequences(rows, prompts, (64, 256), vocabulary)
    if loss == "dpkd":
        many = [row._replace(prompt_ids=many[i - i % 2].prompt_ids) for i, row in enumerate(many)]
    step = engine_step(loss, pair, many, bf16=True)
    optimizer = torch.optim.AdamW(pair[0].parameters(), lr=1e-6, fused=True)

    def whole() -> None:
        step()
        optimizer.step()

    for _ in range(1 if tiny else 4):
        whole()
    count = 1 if tiny else 8
    wait()
    began = time.perf_counter()
    for _ in range(count):
        whole()
    wait()
    seconds = (time.perf_counter() - began) / count
    tokens = sum(len(s.prompt_ids) + len(s.response_ids) for s in many)
    rows = sum(len(s.response_ids) for s in many)
    operations = 0.0
    for model, passes in ((pair[0], 6), (pair[1], 2)):
        head = model.get_output_embeddings().weight.numel()
        body = sum(p.numel() for n, p in model.named_parameters() if p.ndim == 2 and "emb" not in n and "wt" not in n)
        body -= 0 if model.config.tie_word_embeddings else head
        operations += passes * (body * tokens + head * rows)
    return {
        "ms": 1000 * seconds,
        "tokens": rows / seconds,
        "mfu": operations / seconds / PEAK,
        "mib": peak_mib(),
        "busy": profiled(whole, profile, 1 if tiny else 3),
    }


# --- what it says


def report(book: Book) -> str:
    parts = list(dict.fromkeys(part for part, _ in book.found))
    text = []
    for part in parts:
        results = book.of(part)
        keys = list(dict.fromkeys(k for r in results.values() for k in r if k not in ("part", "name", "took", "why")))
        rows = []
        for name, result in results.items():
            if "why" in result:
                rows.append([name, f"not measured: {result['why']}", *["–"] * (len(keys) - 1)])
            else:
                rows.append([name, *(_shown(key, result.get(key)) for key in keys)])
        text.append(f"### {part}\n\n{markdown(['variant', *keys], rows)}")
    return "\n\n".join([*text, "### verdict\n\n" + verdict(book)])


def _shown(key: str, value: float | None) -> str:
    if value is None:
        return "–"
    if key.startswith(("values", "gradient")):
        return f"{value:.1e}"
    digits = 3 if key in ("mfu", "busy", "seconds") else 1 if key in ("ms", "fastest") else 0
    return f"{value:,.{digits}f}"


def verdict(book: Book) -> str:
    """The targets, what was found, and whether they are met."""

    def ratio(part: str, one: str, other: str, key: str) -> float:
        return book.number(part, one, key) / (book.number(part, other, key) or math.nan)

    lines: list[tuple[str, float, str, float]] = []  # what, found, at most or at least, target
    for part in (p for p in dict.fromkeys(p for p, _ in book.found) if p.startswith("step")):
        for loss, peer in (("dpkd fkl", "TRL chunked, forward KL"), ("dpkd jsd", "TRL chunked, JSD")):
            lines.append(
                (f"{part}: {loss}, time of backbones alone", ratio(part, loss, "backbones alone", "ms"), "≤", 1.1)
            )
            lines.append((f"{part}: {loss}, time of {peer}", ratio(part, loss, peer, "ms"), "≤", 0.8))
            lines.append((f"{part}: {loss}, memory of {peer}", ratio(part, loss, peer, "mib"), "≤", 1.0))
            graphs = "CUDA graphs"
            alone = ratio(part, f"{loss}, {graphs}", f"backbones alone, {graphs}", "ms")
            lines.append((f"{part}: {loss}, {graphs}, time of backbones alone, {graphs}", alone, "≤", 1.1))
            lines.append(
                (f"{part}: {loss}, {graphs}, time of {peer}", ratio(part, f"{loss}, {graphs}", peer, "ms"), "≤", 0.8)
            )
    for how in ("", ", compiled"):
        off = (f"dpkd jsd, off-policy{how}", "TRL GKD, off-policy")
        lines.append((f"off-policy{how}, tokens/s of TRL GKD", ratio("runs", *off, "tokens"), "≥", 3.0))
        lines.append((f"off-policy{how}, memory of TRL GKD", ratio("runs", *off, "mib"), "≤", 1 / 3))
        for loss in ("dpo", "pairs"):  # the same objective, and dpkd's own, which has an LM term besides
            pairs = ratio("runs", f"dpkd {loss}{how}", "TRL DPOTrainer", "tokens")
            lines.append((f"{loss}{how}, tokens/s of TRL DPOTrainer", pairs, "≥", 3.0))
        for peer in ("TRL DistillationTrainer, on-policy", "TRL GKD, on-policy"):
            on = ratio("runs", f"dpkd jsd, on-policy{how}", peer, "tokens")
            lines.append((f"on-policy{how}, tokens/s of {peer}", on, "≥", 5.0))
    floor = "CUDA graph of one step (floor)"
    lines.append(("decoding 32 rows, time of the graph", ratio("decode 32", "dpkd", floor, "ms"), "≤", 1.5))
    lines.append(("decoding 32 rows, tokens/s of generate", ratio("decode 32", "dpkd", "generate", "tokens"), "≥", 8.0))
    for name in ("runs", "runs, CUDA graphs", "runs, compiled, CUDA graphs"):
        lines.append((f"MFU of an off-policy step ({name})", book.number("mfu", name, "mfu"), "≥", 0.35))
    for name in book.of("host waits in a step"):
        lines.append((f"host waits in a step of {name}", book.number("host waits in a step", name, "waits"), "≤", 0.0))
    rows = []
    for what, found, way, target in lines:
        if math.isnan(found):
            continue
        met = found <= target if way == "≤" else found >= target
        rows.append([what, f"{found:.2f}", f"{way} {target:.2f}", "met" if met else "missed"])
    return markdown(["what", "found", "target", ""], rows)


PARTS: dict[str, Callable[[Book, bool], None]] = {
    "check": part_check,
    "step": part_step,
    "runs": part_runs,
    "small": part_small,
    "decode": part_decode,
    "mfu": part_mfu,
}


def main(words: list[str] | None = None) -> str:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", nargs="+", choices=[*PARTS, "all"], default=["all"])
    parser.add_argument("--out", type=Path, default=Path("gpu-benchmark"), help="folder of the results")
    parser.add_argument("--limit", type=float, default=150.0, help="seconds for each part")
    parser.add_argument("--tiny", action="store_true", help="small shapes, on a CPU too: to see that it runs")
    parser.add_argument("--only", action="append", default=[], help="a variant by name; repeatable. None: all")
    arguments = parser.parse_args(words)
    if not (CUDA or arguments.tiny):
        raise SystemExit("no GPU: use --tiny to see that the script runs")
    if CUDA:
        torch.set_float32_matmul_precision("high")
    book = Book(arguments.out, arguments.limit, arguments.only)
    for name in PARTS if "all" in arguments.part else arguments.part:
        book.begin_part()
        try:
            PARTS[name](book, arguments.tiny)
        except Exception as error:  # of what the part prepares: the others are measured all the same
            print(f"{name}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
    head = f"{torch.cuda.get_device_name() if CUDA else 'no GPU'}, {machine()}"
    text = f"{head}\n\n{report(book)}\n"
    (arguments.out / "gpu.md").write_text(text, encoding="utf-8")
    return text


if __name__ == "__main__":
    print(main())
