"""Means of some of the rows, without looking how many they are."""

from __future__ import annotations

import math

import torch
from no_waits import NoWaits

from dpkd.train.mean_metrics import MeanMetrics


def test_rows_outside_a_mask_do_not_count_whatever_they_are():
    metrics = MeanMetrics()
    with NoWaits():
        metrics.mean("some", torch.tensor([1.0, math.inf, 3.0, math.nan]), torch.tensor([True, False, True, False]))
        metrics.mean("some", torch.tensor([5.0]), torch.tensor([True]))
        metrics.mean("none", torch.tensor([math.inf]), torch.tensor([False]))
    assert metrics.averages() == {"some": 3.0}
