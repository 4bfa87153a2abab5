"""Models from configurations, and rows of known length, so that a benchmark needs nothing but a tokenizer."""

from __future__ import annotations

import json
import random
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from harness import tokenizer_folder

from dpkd.data.batches import TokenSequence

__all__ = ["GPT2_PAIR", "TINY_PAIR", "Shape", "new_model", "save_model", "sequences", "words", "write_rows"]

VOCABULARY, EOS = 50257, 50256
CHAT = (
    "{% for m in messages %}{{ m['content'] }}{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
)


@dataclass(frozen=True)
class Shape:
    """A GPT-2-shaped model; `spread` is the deviation of its weights (a larger one: sharper predictions)."""

    layers: int
    width: int
    heads: int
    vocabulary: int = VOCABULARY
    positions: int = 512
    spread: float = 0.02


GPT2_PAIR = Shape(4, 256, 4), Shape(8, 512, 8, spread=0.06)
TINY_PAIR = Shape(1, 16, 2), Shape(1, 24, 2, spread=0.06)


def new_model(shape: Shape, seed: int = 0) -> Any:
    """The model, without dropout: variants must agree on what a step costs and where it leads."""
    import torch
    from transformers import AutoModelForCausalLM, GPT2Config

    torch.manual_seed(seed)
    config = GPT2Config(
        n_layer=shape.layers,
        n_embd=shape.width,
        n_head=shape.heads,
        n_positions=shape.positions,
        vocab_size=shape.vocabulary,
        initializer_range=shape.spread,
        bos_token_id=shape.vocabulary - 1,
        eos_token_id=shape.vocabulary - 1,
        attn_pdrop=0.0,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
    )
    return AutoModelForCausalLM.from_config(config)


def save_model(shape: Shape, folder: Path, seed: int = 0) -> Path:
    """A folder of weights with GPT-2's tokenizer, and a chat template that only joins the texts (for TRL)."""
    new_model(shape, seed).save_pretrained(folder)
    for file in tokenizer_folder().iterdir():
        shutil.copy(file, folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": CHAT}), encoding="utf-8")
    return folder


def words() -> list[str]:
    """Words of GPT-2's vocabulary with a space before them: joined, each is one token again."""
    found = json.loads((tokenizer_folder() / "vocab.json").read_text(encoding="utf-8"))
    return sorted(
        word[1:] for word in found if len(word) > 3 and word[0] == "Ġ" and word[1:].isascii() and word[1:].isalpha()
    )


def write_rows(path: Path, count: int, prompt: tuple[int, int], response: tuple[int, int], seed: int = 0) -> Path:
    """Rows of random words; the numbers are the smallest and largest count of tokens (EOS comes on top)."""
    rng, known = random.Random(seed), words()

    def text(low: int, high: int) -> str:
        return "".join(f" {word}" for word in rng.choices(known, k=rng.randint(low, high)))

    rows = [{"prompt": text(*prompt), "completion": text(*response)} for _ in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def sequences(
    count: int, prompt: tuple[int, int], response: tuple[int, int], vocabulary: int = VOCABULARY, seed: int = 0
) -> list[TokenSequence]:
    """Random ids; the last of each response, counted in its length, is EOS."""
    rng, eos = random.Random(seed), vocabulary - 1
    found = []
    for _ in range(count):
        ids = [rng.randrange(eos) for _ in range(rng.randint(*prompt))]
        found.append(TokenSequence(ids, [*(rng.randrange(eos) for _ in range(rng.randint(*response) - 1)), eos]))
    return found


def as_json(pair: tuple[Shape, Shape]) -> list[dict[str, Any]]:
    """Student and teacher, for another process."""
    return [asdict(shape) for shape in pair]
