"""Sums of KL divergences: what kernels are tried on, their float64 reference, and the unfused engine beside them."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import torch

from dpkd.functional import KLSum

CASES = {
    "forward": KLSum(forward=1.0),
    "reverse": KLSum(reverse=0.7),
    "jsd": KLSum(forward=0.3, reverse=0.7, forward_share=0.3, reverse_share=0.3),
    "skew": KLSum(forward=1.0, forward_share=0.1),
    "skew reverse": KLSum(reverse=1.0, reverse_share=0.9),
    "kd": KLSum(forward=0.5, likelihood=0.5),
    "both": KLSum(forward=0.4, reverse=0.6),
    "two mixtures": KLSum(forward=0.4, reverse=0.6, forward_share=0.3, reverse_share=0.8),
    "one mixture, other factors": KLSum(forward=0.5, reverse=0.5, forward_share=0.3, reverse_share=0.3),
    "both, warm": KLSum(forward=0.4, reverse=0.6, temperature=2.0),
    "likelihood": KLSum(likelihood=1.0),
}
SCALES = (1.0, 0.5)  # of the student's logits and of the teacher's
VOCABULARIES = (37, 5000)  # one block, which it does not fill, and two
ROWS, WEIGHT = 3, 0.25


def logits(vocabulary):
    g = torch.Generator().manual_seed(vocabulary)
    student, teacher = (3 * torch.randn(ROWS, vocabulary, generator=g) for _ in range(2))
    teacher[0, 1] = -torch.inf  # the teacher excludes a token
    student[1, 2] = teacher[1, 2] = -torch.inf  # both do
    return student, teacher, torch.tensor([3, 0, vocabulary - 1])


def log_softmax(z):
    z = z - z.max(-1, keepdims=True)
    return z - np.log(np.exp(z).sum(-1, keepdims=True))


def oracle(terms, z, y, targets):
    """The three terms [n], in float64, from raw logits."""
    with np.errstate(divide="ignore", invalid="ignore"):
        log_q, log_p = log_softmax(SCALES[0] * z / terms.temperature), log_softmax(SCALES[1] * y / terms.temperature)
        p, q = np.exp(log_p), np.exp(log_q)

        def kl(mass, log_mass, share):
            m = share * p + (1 - share) * q
            return np.where(mass > 0, mass * (log_mass - np.log(m)), 0.0).sum(-1)

        forward = kl(p, log_p, terms.forward_share) if terms.forward else np.zeros(len(z))
        reverse = kl(q, log_q, terms.reverse_share) if terms.reverse else np.zeros(len(z))
        likelihood = -log_q[np.arange(len(z)), targets] if terms.likelihood else np.zeros(len(z))
    return np.stack([forward, reverse, likelihood], 1)


def slope(terms, z, y, targets, row, column, step=1e-4):
    """The derivative of the weighted value of a row by one raw logit, by central differences."""
    factors = np.array([terms.forward, terms.reverse, terms.likelihood])

    def value(shift):
        moved = z.copy()
        moved[row, column] += shift
        with np.errstate(invalid="ignore"):
            return WEIGHT * (oracle(terms, moved, y, targets)[row] @ factors)

    return (value(step) - value(-step)) / (2 * step)


ENGINE = """
import sys, numpy as np, torch
from transformers import AutoModelForCausalLM, GPT2Config
from dpkd.data.batches import TokenSequence, collate
from dpkd.models import fused
from dpkd.plugins import load_registry
from dpkd.api import LossSpec
from dpkd.api.teachers import Wants
from dpkd.teachers.local import LocalTeacher
from dpkd.train.loss_module import LossModule
from dpkd.train.microbatch import MicroBatch, Term

def model(width, seed):
    torch.manual_seed(seed)
    config = GPT2Config(n_layer=1, n_embd=width, n_head=2, vocab_size=61, n_positions=32, initializer_range=0.3,
                        attn_pdrop=0.0, resid_pdrop=0.0, embd_pdrop=0.0)
    return AutoModelForCausalLM.from_config(config)

batch = collate([TokenSequence((1, 2), (3, 4, 5)), TokenSequence((6,), (7, 8))], pad_id=0)
teacher = LocalTeacher.of(model(24, 1), 61, torch.device("cpu"))
used, original = [], fused.FusedKL.__call__
fused.FusedKL.__call__ = lambda self, *a: (used.append(1), original(self, *a))[1]
found = {}
for name in sys.argv[2:]:
    spec = load_registry().get(LossSpec, name).spec
    config = spec.config()
    output = teacher.score(batch, Wants(2, logits=True))
    for way, measured in [(way, measured) for way in ("fused", "plain") for measured in (False, True)]:
        module = LossModule(model(16, 0), {"main": spec.loss(config)}, vocabulary=61, chunk_mib=1e-6)
        module.chunk = 2
        if way == "plain":
            module._fused = lambda *a: None
        used.clear()
        term = Term("main", spec.signals(config), 0.7, 5.0)
        total, metrics = module(
            MicroBatch("main", batch, [term], False, 1.0, measured, teacher=output, measurable=measured)
        )
        total.backward()
        assert bool(used) == (way == "fused"), (name, way)
        assert ("kl/forward" in metrics.averages()) == measured
        averages = [value for _, value in sorted(metrics.averages().items())]
        found[f"{name}/{way}/{measured}/total"] = np.array([float(total.detach()), *averages])
        for key, p in module.named_parameters():
            found[f"{name}/{way}/{measured}/{key}"] = p.grad.numpy()
np.savez(sys.argv[1], **found)
"""
SUMS = ["fkl", "rkl", "jsd", "kd", "skl", "srkl", "symmetric-kl", "gkd", "seqkd", "distillm", "sft"]
SUMS += ["speculative-kd"]


def engine_gives_the_same(tmp_path, environment):
    """A fused micro-batch of every such loss is, within rounding, the micro-batch computed as the loss is written."""
    path, around = tmp_path / "found.npz", os.environ | environment
    done = subprocess.run([sys.executable, "-c", ENGINE, str(path), *SUMS], capture_output=True, text=True, env=around)
    assert done.returncode == 0, done.stderr[-3000:]
    found = np.load(path)
    keys = [key for key in found.files if "/fused/" in key]
    assert len(keys) > 20 * len(SUMS)
    for key in keys:
        expected = found[key.replace("/fused/", "/plain/")]
        np.testing.assert_allclose(found[key], expected, rtol=2e-4, atol=2e-6, err_msg=key)
