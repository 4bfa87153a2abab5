"""Everything that ends a response."""

from __future__ import annotations

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from dpkd.api import MetricSpec, SamplingSettings
from dpkd.data.encode import Prompt
from dpkd.data.encoding import end_ids
from dpkd.errors import DpkdError
from dpkd.evaluation.answer_cache import answer
from dpkd.plugins import load_registry


@pytest.mark.parametrize(
    ("config", "found"),
    [
        (None, {256}),
        (GenerationConfig(), {256}),
        (GenerationConfig(eos_token_id=7), {7, 256}),
        (GenerationConfig(eos_token_id=[7, 256, 9]), {7, 9, 256}),
    ],
)
def test_the_tokenizers_and_the_generation_configs(byte_level, config, found):
    assert end_ids(byte_level, config) == found


@pytest.mark.parametrize("ids", ["x", 1.5, -1, 10**30, [7, "x"], {"a": 1}])
def test_ids_that_are_none_are_refused(byte_level, ids):
    config = GenerationConfig()
    config.eos_token_id = ids
    with pytest.raises(DpkdError, match=r"expected token ids as `eos_token_id` in generation_config\.json, found"):
        end_ids(byte_level, config)


def test_a_greedy_answer_ends_where_generate_ends(shared_model):
    """stories260K has two ends, 1 and 2, of which the tokenizer names one."""
    folder = shared_model("stories260K")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    prompt = tokenizer("Once upon a time", return_tensors="pt")["input_ids"]
    wanted = model.generate(prompt, do_sample=False, max_new_tokens=400)[0, prompt.shape[1] :].tolist()
    assert end_ids(tokenizer, model) == {1, 2}
    assert len(wanted) < 400
    assert wanted[-1] in (1, 2)
    ((found,),) = answer(
        model,
        [Prompt("f:1", tuple(prompt[0].tolist()), (), (), "")],
        tokenizer,
        vocabulary=model.config.vocab_size,
        sampling=SamplingSettings(temperature=0, max_new_tokens=400),
        seeds=[0],
    ).values()
    assert found.extra["ids"] == wanted
    assert not found.extra["truncated"]


def test_bits_per_byte_count_the_space_that_a_response_begins_with(pieces):
    """SentencePiece drops it when a response is decoded by itself."""
    import math

    import torch
    from transformers import LlamaConfig

    from dpkd.data.batches import TokenSequence
    from dpkd.data.encoding import continuation
    from dpkd.evaluation.evaluator import _DivergenceMeter

    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "num_key_value_heads": 1}
    model = AutoModelForCausalLM.from_config(LlamaConfig(vocab_size=len(pieces), intermediate_size=8, **sizes)).eval()
    prompt, response = ([pieces.convert_tokens_to_ids(t) for t in text] for text in ("ab", "▁cd"))
    meter = _DivergenceMeter(model, None, pieces, len(pieces), lambda *_: None)
    text = continuation(pieces, prompt, response)
    scores = meter([TokenSequence(tuple(prompt), tuple(response))], "x", len(text.encode()))
    spec = load_registry().get(MetricSpec, "bits_per_byte").spec
    found = spec.of_tokens(scores)
    with torch.no_grad():
        logps = model(torch.tensor([[*prompt, *response]])).logits[0].log_softmax(-1)
    nats = -sum(logps[len(prompt) - 1 + i, token].item() for i, token in enumerate(response))
    assert found == pytest.approx(nats / math.log(2) / len(" cd"), rel=1e-4)
