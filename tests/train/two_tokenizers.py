"""A teacher of another tokenizer, and the loss across tokenizers computed the long way."""

from __future__ import annotations

import math
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, PreTrainedTokenizerFast

from dpkd.api import Signal, TokenInputs
from dpkd.cross_tokenizer.token_text import token_pieces
from dpkd.data.encoding import encode, encode_continuations

MERGES = [("e", "d"), ("r", "ed"), ("Ġ", "b"), ("Ġb", "l"), ("o", "l"), ("ol", "d"), ("d", "o"), ("e", "e")]


def other_tokenizer() -> PreTrainedTokenizerFast:
    """ASCII in another order (so that whatever is drawn is text), some parts of words, and an EOS of its own."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    alphabet = ["Ġ", "Ċ", *(chr(n) for n in range(0x7E, 0x20, -1))]
    names = ["<stop>", *alphabet, *dict.fromkeys("".join(pair) for pair in MERGES)]
    merges = [pair for pair in MERGES if all(part in names for part in pair)]
    model = Tokenizer(models.BPE(vocab={name: i for i, name in enumerate(names)}, merges=merges))
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    model.add_special_tokens([AddedToken("<stop>", special=True)])
    return PreTrainedTokenizerFast(tokenizer_object=model, eos_token="<stop>", pad_token="<stop>")


def save_foreign(folder: Path) -> Path:
    """A Llama teacher of another tokenizer."""
    tokenizer = other_tokenizer()
    config = LlamaConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        vocab_size=len(tokenizer) + 3,
        bos_token_id=0,
        eos_token_id=0,
        max_position_embeddings=512,
    )
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(4)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def dense(run_parts: Any, texts: Any, loss: Any, reads: frozenset[Signal]) -> torch.Tensor:
    """The mean over spans, the long way: whole logits, spans by common byte offsets, the chain rule by summing."""
    student, teacher = run_parts.train_step.inner.student, run_parts.teacher.model
    own_tokenizer, other = run_parts.run_data.tokenizer, AutoTokenizer.from_pretrained(teacher.name_or_path)
    own_pieces, other_pieces = token_pieces(own_tokenizer), token_pieces(other)
    values = []
    for index, (response,) in texts[0].responses:
        text = own_tokenizer.decode(response.ids, skip_special_tokens=True)
        valid = text.partition("\ufffd")[0]  # a student may draw half a character: from there on there is no text
        prompt = run_parts.run_data.data.prompts[index]
        ids = list(response.ids)
        (theirs,) = encode_continuations(other, [valid])
        both = zip(valid, other.decode(theirs), strict=False)  # it may not know a character
        read = "".join(a for a, _ in takewhile(lambda pair: pair[0] == pair[1], both)).encode()
        if ids[-1] == own_tokenizer.eos_token_id and read.decode() == text:
            theirs = [*theirs, other.eos_token_id]
        before = encode(other, [prompt.text])[0]
        log_q = _log_probs(student, prompt.prompt_ids, ids)[:, : len(own_pieces)].log_softmax(-1)
        log_p = _log_probs(teacher, before, theirs)[:, : len(other_pieces)].log_softmax(-1)
        cuts = [_ends(pieces, tokens) for pieces, tokens in ((own_pieces, ids), (other_pieces, theirs))]
        at = [0, 0]
        for end in sorted(set(cuts[0]) & set(cuts[1])):
            if len(read) < end < math.inf:
                break
            stops = [own.index(end) + 1 for own in cuts]
            values.append(_value(loss, reads, log_q, log_p, ids, theirs, at, stops, own_pieces, other_pieces))
            at = stops
    return torch.cat(values).mean()


def _ends(pieces: Any, tokens: list[int]) -> list[float]:
    """Bytes up to and with each token; the end of the text lies beyond all."""
    total, ends = 0.0, []
    for token in tokens:
        total = math.inf if pieces[token] is None else total + len(pieces[token])
        ends.append(total)
    return ends


def _log_probs(model: Any, prompt: Any, ids: list[int]) -> torch.Tensor:
    logits = model(torch.tensor([[*prompt, *ids]])).logits[0]
    return logits[len(prompt) - 1 : -1].log_softmax(-1)


def _value(loss, reads, log_q, log_p, ids, theirs, at, stops, own_pieces, other_pieces) -> torch.Tensor:
    """One span: the two distributions of its first token, the student's tokens first, then the teacher's own."""
    places = {piece: i for i, piece in enumerate(own_pieces)}
    row_p = torch.full((len(own_pieces),), -math.inf, dtype=torch.float64)
    extra = []
    for token, piece in enumerate(other_pieces):
        logp = log_p[at[1], token]
        if piece in places:
            row_p[places[piece]] = logp
        else:
            extra.append(logp)
    row_p = torch.cat([row_p, *(logp[None] for logp in extra)])
    row_q = torch.cat([log_q[at[0]], torch.full((len(extra),), -math.inf, dtype=torch.float64)])
    rest_q = sum((log_q[i, ids[i]] for i in range(at[0] + 1, stops[0])), torch.zeros((), dtype=torch.float64))
    rest_p = sum((log_p[i, theirs[i]] for i in range(at[1] + 1, stops[1])), torch.zeros((), dtype=torch.float64))
    signals = {
        Signal.STUDENT_LOGITS: row_q[None],
        Signal.TEACHER_LOGITS: row_p[None].detach(),
        Signal.TARGETS: torch.tensor([ids[at[0]]]),
        Signal.STUDENT_REST: rest_q[None],
        Signal.TEACHER_REST: rest_p[None].detach(),
    }
    return loss(TokenInputs(signals).only(reads))
