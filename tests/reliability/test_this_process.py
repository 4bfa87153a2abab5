"""What other tests may rely on: nothing that was collected has changed the process."""

from __future__ import annotations

import os
import sys

import torch


def test_this_process_has_as_many_threads_as_those_that_it_starts():
    """Products of another process could not be compared to the last digit."""
    assert torch.get_num_threads() == int(os.environ["OMP_NUM_THREADS"])


def test_the_fork_servers_preparation_is_not_imported():
    assert "warm" not in sys.modules
