"""The CUDA kernel of a row's sum; on machines without a GPU in Triton's interpreter."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

pytest.importorskip("triton")

#: Every term of another dtype, more terms than one kernel takes, a length that is no multiple of its block.
CHECK = """
import torch
from imagen_kit.samplers import triton_sum

device = {device!r}
generator = torch.Generator().manual_seed(0)
for k in (1, 2, 3, 8, 9, 17):
    dtypes = [torch.float32, torch.bfloat16, torch.float16]
    tensors = [torch.randn(3, 5, 111, generator=generator).to(device, dtypes[i % 3]) for i in range(k)]
    weights = [0.3 * i - 0.7 for i in range(k)]
    out = triton_sum.weighted_sum(tensors, weights)
    assert out.dtype == torch.float32
    expected = sum(weight * tensor.double() for weight, tensor in zip(weights, tensors))
    # float32 sums of k terms of size up to 20
    assert (out - expected).abs().max().item() < 2e-6 * k, k
print("equal")
"""


def test_the_kernel_in_the_interpreter() -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, "-c", CHECK.format(device="cpu")], env=environment, capture_output=True, text=True
    )
    assert done.stdout == "equal\n", done.stderr


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_kernel_on_the_device() -> None:
    exec(CHECK.format(device="cuda"), {})


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_run_on_the_device_equals_one_on_the_host() -> None:
    from imagen_kit import samplers, schedules

    schedule, x = schedules.create("scaled_linear"), torch.randn(2, 3, 32, 32)
    sampler = samplers.create("dpmpp_3m")
    expected = sampler.sample(lambda x, t: x * 0.5, x, schedule, 8)
    got = sampler.sample(lambda x, t: x * 0.5, x.cuda(), schedule, 8)
    # float32 sums whose products are fused on the device
    torch.testing.assert_close(got.cpu(), expected, rtol=1e-5, atol=1e-5)
