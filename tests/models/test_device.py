"""What is chosen for a GPU, asked where there is none."""

from __future__ import annotations

import pytest
import torch

from dpkd.models.device import attend_without_plans


@pytest.mark.parametrize("gpu", [True, False])
def test_on_a_gpu_no_attention_is_planned_for_each_shape(gpu, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    before = torch.backends.cuda.cudnn_sdp_enabled()
    assert before
    try:
        attend_without_plans()
        assert torch.backends.cuda.cudnn_sdp_enabled() is not gpu
        assert torch.backends.cuda.flash_sdp_enabled()
        assert torch.backends.cuda.mem_efficient_sdp_enabled()
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)
