"""The model as backbone and head, against the model's own logits."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    GPT2Config,
    GraniteConfig,
    LlamaConfig,
    OPTConfig,
    Qwen2Config,
)

from dpkd.data.batches import Layout, TokenSequence, collate
from dpkd.errors import DpkdError
from dpkd.models.head import LogitRule, check_head, head_of, hidden_rows, logit_rule

SMALL = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
CONFIGS = {
    "llama": LlamaConfig(**SMALL),
    "llama-tied": LlamaConfig(**SMALL, tie_word_embeddings=True),
    "gpt2": GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4),
    "opt": OPTConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, ffn_dim=64, word_embed_proj_dim=16
    ),
    "qwen2": Qwen2Config(**SMALL, num_key_value_heads=2),
    "gemma2": Gemma2Config(**SMALL, num_key_value_heads=4, head_dim=8, final_logit_softcapping=2.0),
    "cohere": CohereConfig(**SMALL, logit_scale=0.25),
    "granite": GraniteConfig(**SMALL, logits_scaling=4.0),
}


def build(name):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(CONFIGS[name]).eval()


@pytest.mark.parametrize("name", CONFIGS)
def test_rows_and_head_give_the_models_own_logits(name):
    model = build(name)
    check_head(model)
    sequences = [TokenSequence((5, 6, 7), (8, 9)), TokenSequence((10,), (11, 12, 13, 14, 3))]
    batch = collate(sequences, pad_id=3, layout=Layout(columns=8))
    with torch.no_grad():
        ours = head_of(model).logits(hidden_rows(model, batch))
        own = []
        for prompt, response in sequences:
            logits = model(input_ids=torch.tensor([[*prompt, *response]])).logits[0]
            own.append(logits[len(prompt) - 1 : -1])
    torch.testing.assert_close(ours, torch.cat(own), rtol=1e-4, atol=1e-5)
    assert batch.targets.tolist() == [8, 9, 11, 12, 13, 14, 3]  # EOS stays, though it is the pad as well


def test_rules_are_read_from_the_configuration():
    assert logit_rule(CONFIGS["cohere"]) == LogitRule(scale=0.25)
    assert logit_rule(CONFIGS["granite"]) == LogitRule(scale=0.25)
    assert logit_rule(CONFIGS["gemma2"]) == LogitRule(softcap=2.0)


def test_an_unknown_change_of_the_logits_is_refused():
    model = build("llama")
    model.lm_head.register_forward_hook(lambda module, args, out: out * 1.5)
    with pytest.raises(DpkdError, match="changes its logits after the output head in a way that dpkd does not know"):
        check_head(model)


def test_the_head_is_cut_to_the_shared_vocabulary():
    model = build("gpt2")
    assert head_of(model, 50).weight.shape[0] == 50
