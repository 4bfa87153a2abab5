"""The model card, whole, and its corners."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import yaml
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt

from dpkd.api import Card, Source
from dpkd.report.card import CardFacts, ScoreLine, model_card, write_model_card

FACTS = CardFacts(
    name="runs/rkl-1",
    loss="rkl",
    card=Card(
        title="Reverse KL",
        summary="The student's\n    divergence from the teacher.",
        formula="KL(q‖p) = Σ q (log q − log p)",
        sources=(Source("A Paper", "https://example.org/a", "Eq. 3", "@misc{a,\n  title = {A Paper}\n}"),),
        use_when="often",
        avoid_when="never",
        notes="As written.",
    ),
    teacher="gpt2-xl",
    student="gpt2",
    data="dolly.jsonl",
    steps=100,
    settings={"train.lr": 5e-05, "loss.beta": 0.5},
    scores=(
        ScoreLine("dolly eval", "rouge_l", "Rouge-L", 24.618, 0.31, 500, 5),
        ScoreLine("dolly eval", "em", "EM", 2.0),
    ),
    versions={"torch": "2.13", "dpkd": "0.1.0"},
    base_model="openai-community/gpt2",
    datasets=("databricks/databricks-dolly-15k",),
)

GOLDEN = """\
---
base_model: openai-community/gpt2
datasets:
- databricks/databricks-dolly-15k
library_name: transformers
pipeline_tag: text-generation
tags:
- knowledge-distillation
- dpkd
- rkl
model-index:
- name: runs/rkl-1
  results:
  - task:
      type: text-generation
    dataset:
      name: dolly eval
      type: dolly eval
    metrics:
    - type: rouge_l
      value: 24.618
      name: Rouge-L
    - type: em
      value: 2.0
      name: EM
---

# runs/rkl-1

`gpt2`, distilled from `gpt2-xl` with the loss `rkl` of dpkd.

## Loss: Reverse KL

The student's divergence from the teacher.

```text
KL(q‖p) = Σ q (log q − log p)
```

As written.

## Training

| what | which |
| --- | --- |
| teacher | `gpt2-xl` |
| student | `gpt2` |
| data | `dolly.jsonl` |
| optimizer steps | `100` |

Settings that differ from the defaults:

| setting | value |
| --- | --- |
| `loss.beta` | `0.5` |
| `train.lr` | `5e-05` |

## Scores

| data | metric | value | rows | seeds |
| --- | --- | --- | --- | --- |
| dolly eval | Rouge-L | 24.62 ± 0.31 | 500 | 5 |
| dolly eval | EM | 2.00 |  |  |

## How to load it

From the folder of this file:

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("model")
tokenizer = AutoTokenizer.from_pretrained("model")
```

## Versions

| package | version |
| --- | --- |
| dpkd | 0.1.0 |
| torch | 2.13 |

## Sources

- [A Paper](https://example.org/a), Eq. 3

```bibtex
@misc{a,
  title = {A Paper}
}
```
"""


def test_the_whole_card(tmp_path: Path) -> None:
    write_model_card(tmp_path / "run", FACTS)
    assert (tmp_path / "run" / "README.md").read_text(encoding="utf-8") == GOLDEN
    write_model_card(tmp_path / "run", replace(FACTS, name="again"))
    assert "# again\n" in (tmp_path / "run" / "README.md").read_text(encoding="utf-8")
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["README.md"]


def test_what_is_absent_leaves_no_empty_section() -> None:
    card = replace(FACTS.card, notes="", sources=())
    bare = CardFacts(name="x", loss="sft", card=card, teacher=None, student="gpt2", data="d")
    text = str(model_card(bare))
    assert [line for line in text.splitlines() if line.startswith("#")] == [
        "# x",
        "## Loss: Reverse KL",
        "## Training",
        "## How to load it",
    ]
    assert "`gpt2`, trained with the loss `sft`" in text
    assert "All settings are the defaults" in text
    assert "\n\n\n" not in text


def test_an_adapter_is_loaded_through_peft() -> None:
    text = str(model_card(replace(FACTS, adapter=True, model_folder='odd "name"')))
    assert "from peft import AutoPeftModelForCausalLM\nfrom transformers import AutoTokenizer\n" in text
    assert 'AutoPeftModelForCausalLM.from_pretrained("odd \\"name\\"")' in text
    assert "\nlibrary_name: peft\n" in text


def test_values_cannot_break_tables_fences_or_the_head() -> None:
    card = replace(FACTS.card, formula="```\nx\n```")
    facts = replace(FACTS, card=card, settings={"data.path": "a|b\n`c`"}, base_model="yes: #no", loss="true")
    text = str(model_card(facts))
    assert "| `data.path` | `` a\\|b `c` `` |" in text
    assert "````text\n```\nx\n```\n````" in text
    head = yaml.safe_load(text.split("---\n")[1])
    assert head["base_model"] == "yes: #no"
    assert head["tags"][-1] == "true"


ATTACK = "<img src=x onerror=alert(1)> [x](javascript:alert(1)) | `c` \x1b[31m\n# head"


def test_names_and_texts_from_outside_stay_text() -> None:
    """No HTML, no link, no heading, no escape sequence: read by a Markdown parser with HTML switched on."""
    source = Source(ATTACK, "javascript:alert(1)", ATTACK)
    card = replace(FACTS.card, title=ATTACK, summary=ATTACK.replace("[x](javascript:alert(1))", ""), sources=(source,))
    scores = (ScoreLine(ATTACK, "rouge_l", ATTACK, 1.0),)
    facts = replace(FACTS, name=ATTACK, card=card, teacher=ATTACK, student=ATTACK, scores=scores, data=ATTACK)
    text = ModelCard(str(model_card(facts))).text
    html = MarkdownIt("commonmark", {"html": True}).enable("table").render(text)
    assert "<img" not in html
    assert "href" not in html
    assert "\x1b" not in text
    assert html.count("<h1>") == 1
    (cell,) = re.findall(r"<tr>\s*<td>(.*?)</td>\s*<td>.*?</td>\s*<td>1.00</td>", html)
    assert cell.startswith("&lt;img src=x")
    assert cell.endswith("# head")


def test_the_head_is_what_the_hub_reads(tmp_path: Path) -> None:
    write_model_card(tmp_path, FACTS)
    data = ModelCard.load(tmp_path / "README.md").data
    assert data.base_model == "openai-community/gpt2"
    assert [(one.dataset_name, one.metric_type, one.metric_value) for one in data.eval_results] == [
        ("dolly eval", "rouge_l", 24.618),
        ("dolly eval", "em", 2.0),
    ]
