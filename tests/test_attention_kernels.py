"""Single kernels: which there are, what they refuse, and the adapter of FlashAttention 3 on a stand-in."""

from __future__ import annotations

import sys
import types

import pytest
import torch

from imagen_kit import attention_kernels as kernels
from imagen_kit.attention import attention, backends, record_maps, use_backend
from imagen_kit.errors import KitError


def inputs(dtype=torch.float32, n=5, m=7, device="cpu"):
    g = torch.Generator().manual_seed(0)
    return [torch.randn(2, 3, s, 16, generator=g).to(device, dtype) for s in (n, m, m)]


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    kernels.missing.cache_clear()
    yield
    kernels.missing.cache_clear()


@pytest.fixture
def hopper(monkeypatch):
    """FlashAttention 3 and the GPU it needs need not be there: its adapter is tested on a stand-in."""

    def flash_attn_func(q, k, v, softmax_scale=None):
        logits = torch.einsum("bnad,bmad->banm", q.double(), k.double()) * softmax_scale
        out = torch.einsum("banm,bmad->bnad", logits.softmax(-1), v.double()).to(q.dtype)
        return out if flash_attn_func.alone else (out, logits.logsumexp(-1))

    flash_attn_func.alone = True
    module = types.ModuleType(kernels.FLASH3)
    module.flash_attn_func = flash_attn_func  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, kernels.FLASH3, module)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    monkeypatch.setattr(kernels, "find_spec", lambda name: module)
    kernels.missing.cache_clear()
    yield flash_attn_func
    kernels.missing.cache_clear()


def test_kernels_of_gpus_are_not_offered_without_one(no_gpu):
    assert not set(kernels.ON_GPUS) & set(backends())
    for name in kernels.ON_GPUS:
        with pytest.raises(KitError) as error, use_backend(name):
            pass
        assert f"attention backend {name!r} needs a GPU; choose from sdpa, eager, flex" in str(error.value)


@pytest.mark.parametrize(
    ("capability", "spec", "says"),
    [((8, 9), True, "needs a Hopper GPU"), ((9, 0), None, "is not installed (FlashAttention 3")],
)
def test_flash3_says_what_it_lacks(hopper, monkeypatch, capability, spec, says):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
    monkeypatch.setattr(kernels, "find_spec", lambda name: spec)
    with pytest.raises(KitError) as error, use_backend("flash3"):
        pass
    assert says in str(error.value)


@pytest.mark.parametrize("alone", [True, False])
def test_flash3_gives_attention(hopper, alone):
    hopper.alone = alone
    q, k, v = inputs(torch.bfloat16)
    want = attention(q.double(), k.double(), v.double(), backend="math")
    # one rounding to bfloat16 of averages of values below 4: half of 2^-8 of that
    torch.testing.assert_close(attention(q, k, v, backend="flash3").double(), want, atol=2**-7, rtol=0)


def test_flash3_leaves_masks_to_sdpa_and_refuses_float32(hopper):
    q, k, v = inputs(torch.bfloat16)
    mask = torch.arange(7)[None] < torch.tensor([[7], [3]])
    assert torch.equal(attention(q, k, v, mask, backend="flash3"), attention(q, k, v, mask, backend="sdpa"))
    with pytest.raises(KitError, match="computes in bf16 or fp16, not float32"):
        attention(*inputs(), backend="flash3")


def test_a_kernel_that_cannot_take_the_inputs_is_one_plain_line(monkeypatch):
    monkeypatch.setattr(kernels, "missing", lambda name: None)
    monkeypatch.setattr("imagen_kit.attention.missing", lambda name: None)
    for name in ("cudnn", "efficient"):  # there are none for the CPU
        with pytest.raises(KitError) as error:
            attention(*inputs(), torch.ones(2, 7, dtype=torch.bool), backend=name)
        line = f"attention backend {name!r} has no kernel for cpu in float32, head width 16, with a mask; choose sdpa"
        assert str(error.value) == line


def test_cudnn_is_shown_no_row_without_keys(monkeypatch):
    """cuDNN promises nothing for them, so it is never shown one."""
    seen = []

    def only(name, kernel, q, k, v, mask, scale):
        seen.append(mask)
        return attention(q, k, v, mask, backend="eager", scale=scale)

    monkeypatch.setattr(kernels, "_only", only)
    q, k, v = inputs()
    mask = (torch.arange(7)[None] < torch.tensor([[7], [0]]))[:, None, None]
    got = kernels.cudnn(q, k, v, mask, 0.25)
    assert seen[0].any(-1).all()
    torch.testing.assert_close(got, attention(q, k, v, mask, backend="eager", scale=0.25))
    assert not got[1].any()


def test_maps_are_recorded_whatever_backend_is_active():
    q, k, v = inputs()
    with record_maps() as maps, use_backend("flash"):
        attention(q, k, v)
    assert [p.shape for p in maps] == [(2, 3, 5, 7)]


def test_a_kernel_is_part_of_a_compiled_graph():
    def run(q, k, v):
        return attention(q, k, v) * 2

    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    with use_backend("flash"):
        torch.testing.assert_close(compiled(*inputs()), run(*inputs()))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", ["flash", "cudnn", "efficient", "math"])
def test_kernels_on_the_gpu(name, masked):
    q, k, v = inputs(torch.bfloat16, n=128, m=128, device="cuda")
    mask = (torch.arange(128)[None] < torch.tensor([[128], [0]])).cuda() if masked else None
    want = attention(q.double(), k.double(), v.double(), mask, backend="eager")
    try:
        got = attention(q, k, v, mask, backend=name)
    except KitError as error:
        pytest.skip(str(error))
    # bfloat16 keeps 8 bits of probabilities, values and sums
    torch.testing.assert_close(got.double(), want, atol=3e-2, rtol=0)
