"""Numbers of the host on a device."""

from __future__ import annotations

import fake_cuda
import pytest
import torch

from imagen_kit.sending import send


def test_a_gpu_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    numbers = torch.arange(6.0).view(2, 3)
    with fake_cuda.device(monkeypatch) as gpu:
        there = send(numbers, torch.device("cuda"))
        assert (there.is_cuda, there.shape, there.dtype) == (True, numbers.shape, numbers.dtype)
        assert send(there, torch.device("cuda")) is there
        assert gpu.waits == []
        numbers.to("cuda")
        assert len(gpu.sends) == 1  # plain memory is waited for
    assert send(numbers, torch.device("cpu")) is numbers
