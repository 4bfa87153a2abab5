"""The same runs with the teacher in memory and on a vLLM server: how close the students end, and what it costs.

    python benchmarks/served.py --folder NEW                # writes teacher, student and data; prints how to serve it
    python benchmarks/served.py --folder NEW --server URL   # trains and evaluates; finished runs are kept

The teacher is stories260K with heads of 32 in place of 8, the smallest that vLLM takes on a CPU: the same function.
The student is two of its five layers. Needs the shared models (DPKD_SHARED, default ../shared).
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from every_loss import STORIES, divergences, train, write_stories
from harness import markdown

from dpkd.api import Teacher, Wants
from dpkd.data.batches import TokenSequence, collate
from dpkd.models.in_memory import InMemory
from dpkd.models.settings import TeacherSettings
from dpkd.teachers.local import LocalTeacher
from dpkd.teachers.server.teacher import ServerTeacher

HEAD = 32
NAME = "stories"
SETTINGS: dict[str, Any] = {
    "data.template": "none",
    "train.batch_size": 8,
    "train.micro_batch_size": 16,
    "train.lr": 3e-3,
    "train.log_every": 10,
    "text.sampling.max_new_tokens": 32,
    "text.teacher_sampling.max_new_tokens": 64,
}
LOSSES: dict[str, dict[str, Any]] = {
    "topk-kl": {},
    # All responses of the teacher are written before the first step.
    "seqkd": {"data.limit": 64},
    "dpkd": {"data.limit": 64},
    "opd": {},
    # vLLM 0.30 scores no ids of the caller's choice, and all 512 are many: few tokens a step.
    "topk-rkl": {"train.batch_size": 2, "text.sampling.max_new_tokens": 16},
}
SERVED: dict[str, dict[str, Any]] = {"topk-rkl": {"teacher.top_k": -1}}


def widen_heads(model: torch.nn.Module, head: int) -> Any:
    """A Llama with wider heads that computes the same function.

    New places of queries, keys and values are 0. A frequency of RoPE that a head of d has at pair j, one of h has at
    pair j·h/d; the scores' factor 1/√h in place of 1/√d is made up for in the queries.
    """
    from transformers import AutoModelForCausalLM, LlamaConfig

    own: Any = model.config
    d = own.head_dim
    wide = AutoModelForCausalLM.from_config(LlamaConfig(**{**own.to_dict(), "head_dim": head}))
    pair = torch.arange(d // 2) * (head // d)
    rotated, plain = torch.cat([pair, pair + head // 2]), torch.arange(d)
    state = {}
    for name, weight in model.state_dict().items():
        kind = name.split(".")[-2]
        if kind in ("q_proj", "k_proj", "v_proj"):
            rows = weight.reshape(-1, d, weight.shape[1])
            new = rows.new_zeros(len(rows), head, weight.shape[1])
            new[:, plain if kind == "v_proj" else rotated] = rows * ((head / d) ** 0.5 if kind == "q_proj" else 1.0)
            state[name] = new.flatten(0, 1)
        elif kind == "o_proj":
            columns = weight.reshape(len(weight), -1, d)
            new = columns.new_zeros(*columns.shape[:2], head)
            new[:, :, plain] = columns
            state[name] = new.flatten(1)
        else:
            state[name] = weight
    wide.load_state_dict(state)
    return wide.eval()


def prepare(folder: Path) -> tuple[Path, Path]:
    """The teacher that is served, and the student before training."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    teacher, untrained = folder / "teacher", folder / "untrained"
    if not (teacher / "tokenizer_config.json").exists():
        widen_heads(AutoModelForCausalLM.from_pretrained(STORIES), HEAD).save_pretrained(teacher)
        AutoTokenizer.from_pretrained(STORIES).save_pretrained(teacher)
    if not (untrained / "model").exists():
        nothing = {**SETTINGS, "student.init": "layers", "student.layers": 2, "train.steps": 1, "train.lr": 1e-12}
        train("sft", teacher, write_stories(folder)[0], {**nothing, "train.min_lr": 0.0}, untrained)
    return teacher, untrained / "model"


def one_run(folder: Path, loss: str, server: str | None, steps: int) -> dict[str, float]:
    """Train (once) and evaluate: seconds, divergences on held-out rows, and what the run measured of the server."""
    teacher, student = prepare(folder)
    data, held_out = write_stories(folder)
    run = folder / f"{loss}-{'served' if server else 'local'}"
    if not (run / "result.json").exists():
        settings = {
            **SETTINGS,
            **LOSSES[loss],
            "train.steps": steps,
            "student.model": student,
            "student.dropout": "off",
        }
        if server is not None:
            settings |= {"teacher.model": NAME, "teacher.server": server, **SERVED.get(loss, {})}
        found = {"seconds": train(loss, teacher, data, settings, run), **divergences(str(run), held_out, teacher)}
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        found["waited"] = sum(line.get("teacher/waited", 0.0) for line in lines)
        (run / "result.json").write_text(json.dumps(found))
    return json.loads((run / "result.json").read_text())  # type: ignore[no-any-return]


def runs(folder: Path, losses: list[str], server: str, steps: int) -> str:
    """The table of the runs."""
    teacher, student = prepare(folder)
    before = divergences(str(student), write_stories(folder)[1], teacher)
    rows = [["before training", f"{before['forward_kl']:.3f}", "", f"{before['reverse_kl']:.3f}", "", "", "", ""]]
    for loss in losses:
        local, served = (one_run(folder, loss, where, steps) for where in (None, server))
        numbers = [f"{one[name]:.3f}" for name in ("forward_kl", "reverse_kl") for one in (local, served)]
        rows.append([loss, *numbers, *(f"{s:.0f}" for s in (local["seconds"], served["seconds"], served["waited"]))])
        print(rows[-1], flush=True)
    head = ["loss", *(f"{kl} KL, {who}" for kl in ("forward", "reverse") for who in ("local", "served"))]
    return markdown([*head, "seconds, local", "served", "of these waiting"], rows)


def speed(folder: Path, server: str, sequences: int = 16, tokens: int = 64) -> str:
    """Tokens that each teacher scores a second, and how far the two are apart."""
    from transformers import AutoTokenizer

    path, _ = prepare(folder)
    tokenizer = AutoTokenizer.from_pretrained(path)
    local = LocalTeacher(TeacherSettings(model=str(path)), InMemory())
    local.load(torch.device("cpu"), torch.float32)
    local.cut(len(tokenizer))
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, len(tokenizer), (sequences, 8 + tokens), generator=generator).tolist()
    batch = collate([TokenSequence(row[:8], row[8:]) for row in ids], pad_id=0)
    rows = []
    for k in (0, 16, -1):
        served = ServerTeacher(TeacherSettings(server=server, model=NAME, top_k=k))
        served.check(tokenizer)
        wants = Wants(256, logps=k == 0, logits=k != 0)
        logps, rates = zip(*(_scored(teacher, batch, wants) for teacher in (local, served)), strict=True)
        served.close()
        asked = {0: "the given token", -1: f"all {len(tokenizer)}"}.get(k, f"the {k} likeliest")
        rows.append([asked, *(f"{rate:,.0f}" for rate in rates), f"{float((logps[0] - logps[1]).abs().max()):.1e}"])
    return markdown(["log-probs of", "tokens/s, local", "served", "largest difference, nats"], rows)


def _scored(teacher: Teacher, batch: Any, wants: Wants) -> tuple[torch.Tensor, float]:
    began = time.perf_counter()
    output = teacher.score(batch, wants)
    if wants.logits:
        output.logits(slice(None))
    logps = output.logps()
    return logps, len(logps) / (time.perf_counter() - began)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="new folder for models, data and runs")
    parser.add_argument("--server", help="its address; none: say how to start it")
    parser.add_argument("--loss", action="append", choices=[*LOSSES], help="only this one; repeatable")
    parser.add_argument("--steps", type=int, default=100)
    arguments = parser.parse_args()
    teacher, _ = prepare(arguments.folder)
    if arguments.server is None:
        print(
            f"VLLM_CPU_KVCACHE_SPACE=1 python -m vllm.entrypoints.openai.api_server --model {teacher} "
            f"--served-model-name {NAME} --host 127.0.0.1 --dtype float32 --enforce-eager --max-logprobs -1 "
            "--max-model-len 256"
        )
        return
    print(speed(arguments.folder, arguments.server), end="\n\n", flush=True)
    print(runs(arguments.folder, arguments.loss or [*LOSSES], arguments.server, arguments.steps))


if __name__ == "__main__":
    main()
