"""Examples to tokens: EOS, BOS, the space of SentencePiece, filters, counts; with all tokenizers at hand."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from dpkd.data.conversations import Message
from dpkd.data.encode import tokenize
from dpkd.data.encoding import encode, encode_continuations, prompt_prefix
from dpkd.data.examples import read_examples
from dpkd.data.formats import Example
from dpkd.data.settings import DataSettings
from dpkd.errors import DpkdError

ROOMY = DataSettings(max_prompt_tokens=4000, max_tokens=8000)
TEXTS = [
    "Once upon a time",
    " a space first",
    "\nnew line\n\n  two spaces ",
    "é 日本 😀 naïve",
    "### Response:\n",
    "1. one\n2. two\ttab",
    "a </s> b <|endoftext|> <eos> <s>",
]


def examples(*pairs: tuple[str, str], **kind) -> list[Example]:
    return [Example(f"f:{n}", instruction=q, references=(a,), **kind) for n, (q, a) in enumerate(pairs, 1)]


def decode(tokenizer, ids) -> str:
    return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def test_prompt_and_response_decode_to_their_texts(any_tokenizer):
    """Alpaca spells out special tokens that stand in a text, so that even they come back."""
    rows = [Example("f:1", instruction=q, input=i, references=(a,)) for q in TEXTS for i in ("", "x") for a in TEXTS]
    for prompt in tokenize(rows, any_tokenizer, ROOMY).prompts:
        assert decode(any_tokenizer, prompt.prompt_ids) == prompt.text
        assert decode(any_tokenizer, prompt.prompt_ids + prompt.response_ids) == prompt.text + prompt.references[0]


def test_eos_ends_each_response_once_and_stands_nowhere_else(any_tokenizer):
    eos = any_tokenizer.eos_token_id
    for prompt in tokenize(examples(*[("x", text) for text in TEXTS]), any_tokenizer, ROOMY).prompts:
        assert prompt.response_ids[-1] == eos
        assert (prompt.prompt_ids + prompt.response_ids[:-1]).count(eos) == 0


def test_bos_stands_before_a_prompt_where_the_tokenizer_puts_one(any_tokenizer):
    (prompt,) = tokenize(examples(("x", "y")), any_tokenizer, ROOMY).prompts
    assert list(prompt.prompt_ids) == any_tokenizer(prompt.text)["input_ids"]
    bos = any_tokenizer.bos_token_id
    assert any_tokenizer.eos_token_id == bos or bos not in prompt.response_ids


def test_eos_is_a_token_of_the_response_also_when_it_is_the_pad(byte_level):
    assert byte_level.pad_token_id == byte_level.eos_token_id
    (prompt,) = tokenize(examples(("x", "ab")), byte_level, ROOMY).prompts
    assert byte_level.convert_ids_to_tokens(list(prompt.response_ids)) == ["a", "b", "<eos>"]


def test_a_response_that_already_writes_eos_gets_no_second(byte_level, pieces):
    for tokenizer in (byte_level, pieces):
        eos = tokenizer.eos_token
        (plain,) = tokenize(examples(("x", "ab")), tokenizer, ROOMY).prompts
        (marked,) = tokenize(examples(("x", "ab" + eos)), tokenizer, ROOMY).prompts
        assert marked.response_ids == plain.response_ids
        ready = [Example("f:1", prompt="x", references=(f"ab{eos}\n",))]
        assert tokenize(ready, tokenizer, ROOMY).prompts[0].response_ids == plain.response_ids


def test_a_tokenizer_that_ends_every_text_with_eos_does_not_end_the_prompt(byte_level):
    from tokenizers import processors

    eos = byte_level.eos_token_id
    byte_level.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A <eos>", special_tokens=[("<eos>", eos)]
    )
    assert byte_level("x")["input_ids"][-1] == eos
    assert prompt_prefix(byte_level) == ()
    (prompt,) = tokenize(examples(("x", "ab")), byte_level, ROOMY).prompts
    assert eos not in prompt.prompt_ids
    assert prompt.response_ids.count(eos) == 1


def test_a_ready_prompt_with_its_own_bos_gets_no_second(pieces):
    for text in ("ab", "<s>ab"):
        row = Example("f:1", prompt=text, references=("c",))
        (prompt,) = tokenize([row], pieces, ROOMY).prompts
        assert prompt.prompt_ids.count(pieces.bos_token_id) == 1
        assert prompt.prompt_ids[0] == pieces.bos_token_id


def test_a_chat_prompt_has_the_bos_of_its_template_only_and_real_special_tokens(pieces):
    pieces.chat_template = (
        "<s>{% for m in messages %}{% if m.role == 'user' %}i:{{ m.content }}:{% else %} {{ "
        "m.content }}</s>{% endif %}"
        "{% endfor %}"
    )
    row = Example(
        "f:1", messages=(Message("user", "a"), Message("assistant", "b"), Message("user", "c")), references=("d",)
    )
    (prompt,) = tokenize([row], pieces, ROOMY).prompts
    tokens = pieces.convert_ids_to_tokens(list(prompt.prompt_ids))
    assert "".join(tokens).replace("▁", "") == "<s>i:a:b</s>i:c:"
    assert pieces.convert_ids_to_tokens(list(prompt.response_ids)) == ["▁", "d", "</s>"]  # the template's own space


def test_a_chat_template_that_writes_no_bos_gets_none(pieces):
    pieces.chat_template = "{% for m in messages %}{{ m.content }}:{% endfor %}"
    row = Example("f:1", messages=(Message("user", "a"),), references=("b",))
    (prompt,) = tokenize([row], pieces, ROOMY).prompts
    assert pieces.bos_token_id not in prompt.prompt_ids


def test_the_space_of_sentencepiece_is_not_put_before_a_response(pieces):
    assert pieces.convert_ids_to_tokens(pieces("ab", add_special_tokens=False)["input_ids"]) == ["▁", "a", "b"]
    ids = encode_continuations(pieces, ["ab", " ab"])
    assert [pieces.convert_ids_to_tokens(one) for one in ids] == [["a", "b"], ["▁", "a", "b"]]


def test_an_anchor_that_merges_with_the_text_is_replaced_by_another(pieces):
    from tokenizers import models

    vocab = pieces.get_vocab() | {"\n": 900, "\n\n": 901}
    pieces.backend_tokenizer.model = models.BPE(vocab=vocab, merges=[("\n", "\n")], unk_token="<unk>")
    ids = encode_continuations(pieces, ["\nab", "ab"])
    assert [pieces.convert_ids_to_tokens(one) for one in ids] == [["\n", "a", "b"], ["a", "b"]]


def test_encoding_in_a_batch_is_encoding_one_by_one(any_tokenizer):
    for function in (encode, encode_continuations):
        assert function(any_tokenizer, TEXTS) == [function(any_tokenizer, [text])[0] for text in TEXTS]
    assert encode(any_tokenizer, []) == encode_continuations(any_tokenizer, []) == []


def test_long_responses_are_cut_without_eos_and_counted(byte_level):
    """Behind 3 tokens of prompt, 4 of response and EOS fill 8 exactly; a fifth leaves no room for EOS."""
    rows = [Example(f"f:{n}", prompt="abc", references=("x" * n,)) for n in (3, 4, 5, 9)]
    settings = DataSettings(max_prompt_tokens=3, max_tokens=8)
    data = tokenize(rows, byte_level, settings)
    eos = byte_level.eos_token_id
    assert [(len(p.response_ids), p.response_ids[-1] == eos) for p in data.prompts] == [
        (4, True),
        (5, True),
        (5, False),
        (5, False),
    ]
    assert data.report.lines()[1:3] == [
        "4 of 4 examples kept: 31 tokens, 19 in responses, the longest 8",
        "truncated 2: responses longer than 8 tokens, without EOS",
    ]


@pytest.mark.parametrize(
    ("context", "advice"),
    [
        (None, "99 of 100 fit into --set data.max_prompt_tokens=8 --set data.max_tokens=13, where memory allows it"),
        (13, "99 of 100 fit into --set data.max_prompt_tokens=8 --set data.max_tokens=13, where memory allows it"),
        (12, "the models read at most 12 tokens: 3 fit into --set data.max_prompt_tokens=6 --set data.max_tokens=12"),
        (6, "the models read at most 6 tokens, so that no setting keeps more of them whole"),
    ],
)
def test_advice_on_lengths_is_what_the_models_can_read(context, advice, byte_level):
    """Prompts of 2, 4, 6 and 8 tokens, each with a response of 4 and EOS."""
    rows = [Example(f"f:{n}", prompt="x" * n, references=("four",)) for n in (2, 4, 6, 8)]
    found = tokenize(rows, byte_level, DataSettings(max_prompt_tokens=2, max_tokens=6), context=context).report.lengths
    assert found == f"warning: 4 of 4 examples are dropped or cut for their length; {advice}"


def test_filters_are_counted(byte_level):
    rows = [
        Example("f:1", prompt="abcd", references=("one two three four",)),
        Example("f:2", prompt="abc", references=("one two three",)),
        Example("f:3", prompt="abc", references=("one two", "one two three four")),
        Example("f:4", prompt="abc", references=("one two three four",)),
    ]
    data = tokenize(rows, byte_level, DataSettings(max_prompt_tokens=3, max_tokens=99, min_response_words=3))
    assert [p.id for p in data.prompts] == ["f:4"]
    assert "; ".join(data.report.lines()[1:4]) == (
        "1 of 4 examples kept: 22 tokens, 19 in responses, the longest 22; "
        "dropped 1: prompts longer than 3 tokens; dropped 2: responses of at most 3 words"
    )


def test_nothing_left(byte_level):
    with pytest.raises(DpkdError) as caught:
        tokenize(examples(("x", "y"), ("x", "z")), byte_level, DataSettings(max_prompt_tokens=3))
    assert str(caught.value) == (
        "none of 2 examples is left: 2 prompts longer than 3 tokens. Raise data.max_prompt_tokens, or lower "
        "data.min_response_words."
    )


def test_prompts_without_a_response(byte_level):
    rows = [Example("f:1", prompt="abc"), Example("f:2", prompt="abc", references=("x",))]
    data = tokenize(rows, byte_level, DataSettings(min_response_words=0), require_response=False)
    assert [len(p.response_ids) for p in data.prompts] == [0, 2]
    with pytest.raises(DpkdError, match=r"^f:1: this row has no response to train on\.$"):
        tokenize(rows, byte_level, ROOMY)


def test_all_references_are_kept_and_the_first_is_trained(byte_level):
    (prompt,) = tokenize([Example("f:1", prompt="a", references=("b", "c"))], byte_level, ROOMY).prompts
    assert prompt.references == ("b", "c")
    assert byte_level.decode(prompt.response_ids[:-1]) == "b"


def test_a_tokenizer_without_eos(byte_level):
    byte_level.eos_token = None
    with pytest.raises(DpkdError) as caught:
        tokenize(examples(("x", "y")), byte_level, ROOMY)
    assert str(caught.value) == (
        "the tokenizer (unnamed) has no EOS token: a response could never end. Set `eos_token` in its "
        "tokenizer_config.json."
    )


def test_real_rows_come_back_from_their_tokens(any_tokenizer, shared):
    settings = DataSettings(path=str(shared / "dolly" / "eval.jsonl"), max_prompt_tokens=4000, max_tokens=20000)
    data = tokenize(read_examples(settings).examples, any_tokenizer, settings)
    assert data.report.kept == 500
    assert data.report.tokens == sum(len(p.prompt_ids) + len(p.response_ids) for p in data.prompts)
    wrong = [
        p.id for p in data.prompts if decode(any_tokenizer, p.prompt_ids + p.response_ids) != p.text + p.references[0]
    ]
    assert wrong == []


def test_what_wrote_the_prompts_is_said(byte_level):
    ready = Example("f:1", prompt="abc ", references=("x",))
    report = tokenize([ready], byte_level, DataSettings()).report
    assert report.lines()[0] == "prompts are written as they are (data.template: none, chosen by auto)"
    both = [ready, replace(ready, id="f:2", template="alpaca")]
    report = tokenize([*both, replace(both[1], id="f:3")], byte_level, DataSettings(template="none")).report
    assert report.lines()[0] == (
        "prompts are written in the Alpaca form (2) and as they are (1) (data.template: alpaca and none)"
    )


@pytest.mark.parametrize(
    ("prompt", "response", "template", "warns"),
    [
        ("Name a colour", "blue", "none", True),
        ("Name a colour:", "blue", "none", False),
        ("Name a colour", " blue", "none", False),
        ("Name a colour\n", "blue", "none", False),
        ("Name a colour", "blue", "alpaca", False),
    ],
)
def test_a_prompt_glued_to_its_response_is_a_warning(byte_level, prompt, response, template, warns):
    examples = [Example("f:1", prompt=prompt, references=(response,)), Example("f:2", prompt="a ", references=("b",))]
    lines = tokenize(examples, byte_level, DataSettings(template=template)).report.lines()
    found = [line for line in lines if line.startswith("warning:")]
    assert len(found) == warns
    if warns:
        assert "1 of 2 prompts join their response" in found[0]
        assert "'Name a colour⟦blue⟧'" in found[0]


def test_both_responses_of_a_pair(byte_level):
    example = Example("f:1", prompt="a ", references=("yes",), rejected="not at all")
    (prompt,) = tokenize([example], byte_level, DataSettings(max_tokens=8, max_prompt_tokens=4)).prompts
    eos = byte_level.eos_token_id
    assert byte_level.decode(prompt.response_ids) == "yes<eos>"
    assert (byte_level.decode(prompt.rejected_ids), eos in prompt.rejected_ids) == ("not at", False)


CHATML = (
    "{% for m in messages %}<|{{ m.role }}|>\n{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<eos>"
    "{% endgeneration %}{% else %}{{ m.content }}<eos>{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated")  # SFTConfig of TRL 1.16 sets it
def test_the_trained_tokens_are_those_of_trls_assistant_only_loss(byte_level, jsonl, tmp_path):
    """Each assistant turn is an example; together they train the tokens of TRL's mask, each behind the same tokens."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, LlamaConfig
    from trl import SFTConfig, SFTTrainer

    byte_level.chat_template = CHATML
    turns = [("system", "Be kind."), ("user", "Hi"), ("assistant", "Hello!"), ("user", "1+1?"), ("assistant", "Two.")]
    messages = [{"role": role, "content": content} for role, content in turns]
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "num_key_value_heads": 1}
    args = SFTConfig(str(tmp_path), assistant_only_loss=True, bf16=False, use_cpu=True, report_to="none")
    trainer = SFTTrainer(
        AutoModelForCausalLM.from_config(LlamaConfig(vocab_size=257, intermediate_size=8, **sizes)),
        args,
        train_dataset=Dataset.from_list([{"messages": messages}]),
        processing_class=byte_level,
    )
    theirs = trainer.train_dataset[0]
    mask = theirs.get("assistant_masks") or [int(label != -100) for label in theirs["labels"]]
    found = read_examples(DataSettings(path=jsonl({"messages": messages})))
    prompts = tokenize(found.examples, byte_level, DataSettings()).prompts
    assert [p.id for p in prompts] == ["data.jsonl:1#1", "data.jsonl:1#2"]
    trained = set()
    for prompt in prompts:
        start, ids = len(prompt.prompt_ids), [*prompt.prompt_ids, *prompt.response_ids]
        assert list(theirs["input_ids"][: len(ids)]) == ids
        trained |= set(range(start, len(ids)))
    assert trained == {place for place, on in enumerate(mask) if on}
    assert len(trained) == len("Hello!") + len("Two.") + 2


def test_lengths_that_lose_many_examples_come_with_advice_that_loses_few(byte_level):
    rows = examples(*[("x" * n, "y" * (3 * n)) for n in range(1, 201)])
    tight = DataSettings(max_prompt_tokens=200, max_tokens=400)
    told = tokenize(rows, byte_level, tight).report
    lost = sum(told.dropped.values()) + told.cut
    assert f"warning: {lost:,} of 200 examples are dropped or cut for their length" in told.lengths
    prompt, both = (int(number) for number in re.findall(r"tokens=(\d+)", told.lengths))

    def loses(**changes):
        report = tokenize(rows, byte_level, DataSettings(max_prompt_tokens=prompt, max_tokens=both, **changes)).report
        return sum(report.dropped.values()) + report.cut

    assert loses() == 2, "one of a hundred"
    both -= 1
    assert loses() > 2
    assert tokenize(rows, byte_level, ROOMY).report.lengths is None
    assert tokenize(rows[:30], byte_level, tight).report.lengths is None, "few are no matter"
