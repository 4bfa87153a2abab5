"""Every benchmark runs, with tiny models: what it says is for `make bench`."""

from __future__ import annotations

import importlib
import json
import os
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SHARED = Path(os.environ.get("DPKD_SHARED", ROOT.parent / "shared"))
needs_tokenizer = pytest.mark.skipif(
    not (SHARED / "tokenizers/gpt2").is_dir(), reason="no tokenizers in the shared folder (DPKD_SHARED)"
)
needs_stories = pytest.mark.skipif(
    not (SHARED / "models/stories260K").is_dir(), reason="no stories260K in the shared folder (DPKD_SHARED)"
)
# TRL's and transformers' own warnings are not ours to mend.
pytestmark = [pytest.mark.filterwarnings("ignore")]


@pytest.fixture(autouse=True)
def _fresh(monkeypatch, tmp_path):
    from accelerate.state import AcceleratorState

    monkeypatch.setenv("DPKD_CACHE", str(tmp_path / "cache"))
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def bench(monkeypatch):
    """`bench(name)`: the module of a benchmark, which finds its neighbours."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    before = set(sys.modules)
    yield importlib.import_module
    for name in set(sys.modules) - before:
        if str(ROOT / "benchmarks") in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


def cells(table: str) -> list[list[str]]:
    """The rows of a table, without its head."""
    lines = [line for line in table.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def test_step(bench):
    step = bench("step")
    chosen = [name for name in step.VARIANTS if not name.startswith(("TRL", "Liger"))]
    assert [row[0] for row in cells(step.table(chosen, 1, "tiny", memory=False))] == chosen


def test_steps_of_peers(bench):
    pytest.importorskip("trl", reason="TRL is a development dependency")
    step = bench("step")
    chosen = [name for name in step.VARIANTS if name.startswith(("TRL", "Liger"))]
    assert len(cells(step.table(chosen, 1, "tiny", memory=False))) == len(chosen)


def test_growth_and_layouts(bench):
    assert len(cells(bench("growth").table(1, tiny=True))) == 1
    layouts = bench("layouts")
    assert [row[0] for row in cells(layouts.table(1, tiny=True))] == list(layouts.LAYOUTS)


def test_cpu_kernels(bench):
    kernels = bench("cpu_kernels")
    assert [row[1] for row in cells(kernels.table(1, tiny=True))] == list(kernels.LOSSES)


def test_growth_asks_for_memory_of_points_that_exist(bench):
    points = bench("growth").points()
    assert len({point.what for point in points}) == len(points) > 10


@needs_tokenizer
def test_runs_learn_from_the_same_rows(bench):
    """Ours and the floor train on the same tokens and end at the same place."""
    runs = bench("runs")
    ours, floor = "dpkd train --loss jsd", "floor, JSD"
    found = runs.collect([ours, floor, "released script's shape, DPKD + pre-training KD"], 1, "tiny", apart=False)
    assert found[ours]["tokens"] == found[floor]["tokens"]
    assert found[ours]["divergence"] == pytest.approx(found[floor]["divergence"], rel=1e-3)


@needs_tokenizer
def test_runs_of_peers(bench):
    pytest.importorskip("trl", reason="TRL is a development dependency")
    runs = bench("runs")
    chosen = [name for name in runs.VARIANTS if name.startswith("TRL")]
    assert len(cells(runs.table(chosen, 1, "tiny", apart=False))) == len(chosen)


@needs_tokenizer
def test_memory_predicts_a_run(bench, tmp_path):
    memory = bench("memory")
    memory.prepare(str(tmp_path), "fkl", True)
    guess, moment = memory.predicted(str(tmp_path), "fkl", True)
    assert guess > 10
    assert moment == "losses"


@pytest.mark.parametrize("part", ["check", "step", "runs", "small", "decode", "mfu"])
def test_every_part_of_the_gpu_script_runs_on_a_cpu(bench, part, tmp_path, monkeypatch):
    """But for what needs a GPU or a package that is not installed; layers are traced, and no code is made of them."""
    monkeypatch.setattr("dpkd.models.compile.BACKEND", "eager")
    pytest.importorskip("trl", reason="TRL is a development dependency")
    gpu = bench("gpu")
    if gpu.CUDA:
        pytest.skip("there is a GPU: run the script")
    text = gpu.main(["--tiny", "--part", part, "--out", str(tmp_path), "--limit", "1000"])
    lines = [json.loads(line) for line in (tmp_path / "gpu.jsonl").read_text(encoding="utf-8").splitlines()]
    failed = {line["name"]: line["why"] for line in lines if "why" in line}
    needs_gpu = {"CUDA graph of one step (floor)", "forward", "reverse", "jsd", "kd"}
    assert {name.split(", ")[0] for name in failed} <= {"Liger chunked JSD", *needs_gpu}, failed
    assert len(lines) > len(failed)
    assert "### verdict" in text
    again = gpu.main(["--tiny", "--part", part, "--out", str(tmp_path), "--limit", "1000"])
    assert again.count("\n") == text.count("\n")  # what is known is not measured again


def test_startup_runs_commands(bench):
    startup = bench("startup")
    startup._run(startup.COMMANDS["dpkd --help"])
    found = {"dpkd --help": 0.5, "dpkd list-losses": 1.0, startup.TORCH: 1.0}
    assert [met for _, met in startup.targets(found).values()] == [False, True]


@needs_tokenizer
def test_ways_to_wait(bench, monkeypatch):
    waiting, seen = bench("waiting"), []

    def here(module, function, *arguments, environment=waiting.POLICIES["libgomp's default"]):
        seen.append(environment.get("OMP_WAIT_POLICY"))
        return getattr(bench(module), function)(*arguments)

    monkeypatch.setattr(waiting, "call_in_process", here)
    assert [row[0] for row in cells(waiting.table(1, "tiny"))] == list(waiting.POLICIES)
    assert seen == [None, None, None, "PASSIVE", "PASSIVE"]  # the first makes models and rows


def test_the_page_has_a_place_for_every_table(bench):
    everything = bench("all")
    page = everything.PAGE.read_text(encoding="utf-8")
    text = everything.filled(page, {"step": "| new |"})
    assert "<!-- measured: step -->\n| new |\n<!-- end -->" in text
    assert re.sub(r"\| new \|", "", text).count("<!-- measured") == page.count("<!-- measured")
    with pytest.raises(SystemExit, match="has places for"):
        everything.filled("nothing", {})


def test_sampling(bench):
    assert len(cells(bench("sampling").table(1, tiny=True))) == 2


def test_decoding(bench):
    page = bench("decoding").decode_part("cpu", tiny=True)
    ways = ["floor (forward only)", "dpkd graph", "dpkd graph, top-p 0.9", "dpkd eager", "generate"]
    assert [row[1] for row in cells(page)] == ways
    assert "graph True; 4 of 4 responses as eagerly" in page
    assert "Error" not in page


def test_served_widens_heads_and_keeps_the_function(bench):
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=50, intermediate_size=48, initializer_range=0.3, **sizes)).eval()
    wide = bench("served").widen_heads(model, 32)
    ids = torch.randint(0, 50, (3, 40))
    with torch.no_grad():
        torch.testing.assert_close(wide(ids).logits, model(ids).logits, atol=1e-4, rtol=1e-4)
    assert wide.config.head_dim == 32


def test_ranks_of_runs(bench):
    """By hand: 1 - 6 Σ d² / (n (n² - 1)), with d = 0, 1, -1 for one metric and the order turned round for the other."""
    runs = [{"rouge_l": r, "nll": n, "up": u, "same": 1.0} for r, n, u in ((1, 3, 1), (2, 2, 9), (3, 1, 4))]
    assert bench("rank").ranks([*runs]) == pytest.approx({"nll": -1.0, "up": 1 - 6 * 2 / 24})


@needs_stories
def test_evidence_on_stories_has_every_stage_of_the_one_on_a_gpu(bench, tmp_path):
    evidence = bench("evidence_stories")
    values = evidence.sweep(tmp_path)
    on_a_gpu = evidence.yaml.safe_load(evidence.FILE.with_name("evidence.yaml").read_text(encoding="utf-8"))
    assert set(values["stages"]) == set(on_a_gpu["stages"])
    assert set(values["evaluate"]["stages"]) == set(on_a_gpu["evaluate"]["stages"])
    assert {*evidence.STEPS, *evidence.RATES} <= set(values["stages"])
    path = tmp_path / "sweep.yaml"
    path.write_text(evidence.yaml.safe_dump(values, sort_keys=False), encoding="utf-8")
    runs = evidence.read_sweep(path).runs  # checks the settings of each
    seeds = [run.settings.get("seed") for run in runs if run.stage == "pairs"]
    assert {seeds.count(seed) for seed in (10, 20, 30)} == {6}


@needs_stories
def test_rows_of_the_task_on_stories(bench, tmp_path, monkeypatch):
    evidence = bench("evidence_stories")
    monkeypatch.setattr(evidence, "ROWS", {"train": 4, "dev": 2, "held_out": 2})
    monkeypatch.setattr(evidence, "BEGINNINGS", 60)
    evidence.write_task(tmp_path)
    rows = [
        json.loads(line)
        for name in evidence.ROWS
        for line in (tmp_path / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    assert len({row["prompt"] for row in rows}) == len(rows) == 8
    for row in rows:
        assert row["prompt"].startswith(evidence.BEGINNING)
        assert len(evidence.sentences(row["completion"] + " The")) == 2
