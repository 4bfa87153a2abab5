"""A toy pair of models and rows in a folder, commands over them, and what two folders must have in common."""

from __future__ import annotations

import hashlib
import json
from contextlib import suppress
from pathlib import Path
from typing import Any

WORDS = ["red", "blue", "green", "old", "new", "big", "small", "cat", "dog", "tree", "house", "river", "sings", "runs"]
LIMITS = ["--set", "text.sampling.max_new_tokens=6", "--set", "text.teacher_sampling.max_new_tokens=6"]
TRAIN = [
    *("train", "--loss", "kd", "--teacher", "../toy/model", "--data", "../toy/data.jsonl", "--output", "run"),
    *("--set", "student.init=layers", "--set", "student.layers=1", "--set", "train.steps=4", "--set", "train.lr=0.01"),
    *("--set", "train.batch_size=4", "--set", "train.log_every=1", "--set", "train.save_every=2"),
    *("--set", "train.device=cpu", "--set", "text.source=mixed", *LIMITS),
    *("--set", 'text.mix={"dataset": 0.5, "student": 0.5}', "--set", "text.refresh=every_n_steps"),
    *("--set", "text.every=3", "--set", "dev.path=../toy/data.jsonl", "--set", "dev.limit=2", "--set", "dev.every=2"),
    *("--set", "dev.max_new_tokens=4", "--set", "dev.metric=nll"),
]
EVAL = [
    *("eval", "--model", "../toy/model", "--data", "../toy/data.jsonl", "--output", "evaluations/data"),
    *("--max-new-tokens", "4", "--teacher", "../toy/model", "--limit", "6", "--seeds", "1,2"),
]
SAMPLE = [
    *("sample", "--model", "../toy/model", "--data", "../toy/data.jsonl", "--output", "answers.jsonl"),
    *("--max-new-tokens", "4", "--batch-size", "1"),
]
CACHE = [
    *("cache", "--loss", "kd", "--teacher", "../toy/model", "--data", "../toy/data.jsonl", "--output", "store"),
    *("--set", "student.init=layers", "--set", "student.layers=1", "--kind", "sampled", "--k", "8", *LIMITS),
]
REPORT = ["report", "run", "--no-figures"]
COMPARE = ["compare", "evaluations", "--format", "csv", "--output", "table.csv"]
SWEEP = ["sweep", "../toy/sweep.yaml"]
SWEEP_FILE = {
    "output": "runs",
    "settings": {
        "teacher.model": "../toy/model",
        "data.path": "../toy/data.jsonl",
        "train.steps": 2,
        "train.device": "cpu",
        "train.log_every": 1,
    },
    "stages": {
        "first": {"settings": {"loss.name": "sft", "student.init": "layers", "student.layers": 1}},
        "second": {"settings": {"loss.name": "kd", "student.model": "{first}"}},
    },
    "evaluate": {"data": ["../toy/data.jsonl"], "options": {"seeds": "1", "max_new_tokens": 2, "limit": 2}},
}
# What no two runs have in common: times, memory, and what the checksums of such files are.
VARIES = {
    "seconds",
    "tokens_per_second",
    "peak_memory_mib",
    "command",
    "machine",
    "check",
    "files",
    "changes",
    "records",
}


def write_toy(folder: Path) -> None:
    """A Llama of two layers over bytes, rows of unequal lengths, and a sweep."""
    import torch
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<eos>", special=True)])
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=257,
        bos_token_id=256,
        eos_token_id=256,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder / "model")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<eos>").save_pretrained(
        folder / "model"
    )
    rows = [
        {"prompt": " ".join(WORDS[i % 7 : i % 7 + 1 + i % 3]), "response": " ".join(WORDS[i % 5 : i % 5 + 1 + i % 4])}
        for i in range(12)
    ]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (folder / "sweep.yaml").write_text(json.dumps(SWEEP_FILE), encoding="utf-8")


def fingerprint(folder: Path) -> dict[str, str]:
    """A hash of each file that a command leaves behind, without times and the like."""
    found = {}
    for file in sorted(path for path in folder.rglob("*") if path.is_file() and not path.name.startswith(".")):
        content = file.read_bytes()
        if file.suffix in (".json", ".jsonl", ".part") and content:
            lines = [content] if file.suffix == ".json" else content.splitlines()
            with suppress(ValueError):  # a damaged file counts byte by byte
                content = json.dumps([_steady(json.loads(line)) for line in lines], sort_keys=True).encode()
        found[str(file.relative_to(folder))] = hashlib.sha256(content).hexdigest()[:16]
    return found


def _steady(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _steady(item) for name, item in value.items() if name not in VARIES}
    return [_steady(item) for item in value] if isinstance(value, list) else value
