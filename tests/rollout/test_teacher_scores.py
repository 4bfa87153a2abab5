"""The teacher's log-probs of drawn responses: each token has its own, in whatever batches they were computed."""

from __future__ import annotations

from types import SimpleNamespace

import torch

from dpkd.api import Response, Text
from dpkd.rollout.response_generators import RankShards, TeacherScorer


class TargetsAsLogps:
    """Says of each token its id."""

    def expect(self, sequences, wants):
        pass

    def score(self, batch, wants):
        return SimpleNamespace(logps=lambda: batch.targets.float())


def test_each_token_has_its_own_value():
    prompts = [SimpleNamespace(prompt_ids=tuple(range(1, 2 + i))) for i in range(3)]
    responses = [Response(ids, Text.STUDENT, False) for ids in ((7, 8, 9), (), (5,), (6, 4), (3, 2, 1, 3))]
    scorer = TeacherScorer(TargetsAsLogps(), prompts, 0, 16, torch.device("cpu"), RankShards())
    scored = scorer([0, 1, 2, 0, 1], responses)
    assert [r.teacher_logps.tolist() for r in scored] == [list(map(float, r.ids)) for r in responses]
