"""Every attention backend against softmax written out over the allowed keys alone, in float64."""

from __future__ import annotations

import sys
import types

import pytest
import torch

from imagen_kit import attention as module
from imagen_kit.attention import attention, backends, own_values, record_maps, set_backend, use_backend
from imagen_kit.errors import KitError

B, A, N, M, D = 2, 3, 5, 7, 16
BACKENDS = ["sdpa", "flash", "math", "eager", "flex", "xformers"]


def plain_xformers(q, k, v, attn_bias=None, scale=None):
    """What xformers takes: (b, n, a, d) and a full bias with aligned rows; NaN for a row of -inf."""
    logits = torch.einsum("bnad,bmad->banm", q, k) * scale
    if attn_bias is not None:
        assert attn_bias.shape == logits.shape
        assert attn_bias.stride(-1) == 1
        assert all(stride % 8 == 0 for stride in attn_bias.stride()[:-1])
        assert attn_bias.dtype == q.dtype
        logits = logits + attn_bias
    return torch.einsum("banm,bmad->bnad", logits.softmax(-1), v)


@pytest.fixture(autouse=True)
def stand_in(monkeypatch):
    """xformers need not be installed: its adapter is tested on a stand-in with the same demands."""
    ops = types.ModuleType("xformers.ops")
    ops.memory_efficient_attention = plain_xformers  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "xformers", types.ModuleType("xformers"))
    monkeypatch.setitem(sys.modules, "xformers.ops", ops)
    monkeypatch.setattr(module, "_has_xformers", lambda: True)


def inputs(dtype=torch.float64, grad=False):
    g = torch.Generator().manual_seed(0)
    shapes = (B, A, N, D), (B, A, M, D), (B, A, M, D)
    return [torch.randn(s, generator=g, dtype=torch.float64).to(dtype).requires_grad_(grad) for s in shapes]


def masks():
    g = torch.Generator().manual_seed(1)
    keys = torch.tensor([[True] * 4 + [False] * 3, [True] * 7])
    return {
        "none": None,
        "keys": keys,
        "queries_and_keys": (torch.rand(B, 1, N, M, generator=g) < 0.6) | (torch.arange(M) == 2),
        "heads": (torch.rand(B, A, N, M, generator=g) < 0.5) | (torch.arange(M) == 0),
        "one_row_without_keys": torch.stack([keys[0], torch.zeros(M, dtype=torch.bool)]),
    }


def reference(q, k, v, mask, scale=D**-0.5):
    """Row by row, over the allowed keys only; zero where there are none."""
    full = torch.ones(B, A, N, M, dtype=torch.bool)
    if mask is not None:
        full = full & (mask[:, None, None] if mask.ndim == 2 else mask)
    out = torch.zeros(B, A, N, D, dtype=torch.float64)
    for b in range(B):
        for a in range(A):
            for n in range(N):
                keep = full[b, a, n]
                if keep.any():
                    weights = (k[b, a, keep] @ q[b, a, n] * scale).exp()
                    out[b, a, n] = weights / weights.sum() @ v[b, a, keep]
    return out


@pytest.mark.parametrize("mask", masks())
@pytest.mark.parametrize("backend", BACKENDS)
def test_equals_softmax_over_the_allowed_keys(backend, mask):
    q, k, v = inputs()
    want = reference(q, k, v, masks()[mask])
    got = attention(q, k, v, masks()[mask], backend=backend)
    torch.testing.assert_close(got, want, atol=1e-12, rtol=0)  # float64 rounding of sums of seven terms


@pytest.mark.parametrize("backend", BACKENDS)
def test_scale(backend):
    q, k, v = inputs()
    torch.testing.assert_close(
        attention(q, k, v, backend=backend, scale=0.3), reference(q, k, v, None, 0.3), atol=1e-12, rtol=0
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_bfloat16(backend):
    q, k, v = inputs(torch.bfloat16)
    mask = masks()["keys"]
    got = attention(q, k, v, mask, backend=backend)
    assert got.dtype == torch.bfloat16
    want = reference(q.double(), k.double(), v.double(), mask)
    # bf16 keeps 8 bits: a few roundings of 2^-9 on values below 3
    torch.testing.assert_close(got.double(), want, atol=0.03, rtol=0)


@pytest.mark.parametrize("backend", ["sdpa", "flash", "math", "eager", "xformers"])
@pytest.mark.parametrize("mask", ["none", "keys", "heads", "one_row_without_keys"])
def test_gradients(backend, mask):
    direction = torch.randn(B, A, N, D, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    grads = []
    for compute in (
        lambda *x: attention(*x, masks()[mask], backend=backend),
        lambda *x: reference(*x, masks()[mask]),
    ):
        leaves = inputs(grad=True)
        grads.append(torch.autograd.grad((compute(*leaves) * direction).sum(), leaves))
    for got, want in zip(*grads, strict=True):
        torch.testing.assert_close(got, want, atol=1e-12, rtol=0)


def test_the_active_backend_is_used_and_restored(monkeypatch):
    used = []
    for name in ("eager", "flex"):
        monkeypatch.setitem(module._OTHERS, name, lambda q, *_, name=name: used.append(name) or q)
    q, k, v = inputs()
    with use_backend("eager"):
        attention(q, k, v)
        with use_backend("flex"):
            attention(q, k, v)
        with pytest.raises(KitError), use_backend("flex"):
            attention(q, k, v, torch.ones(B, M))
        attention(q, k, v)
        attention(q, k, v, backend="flex")
    attention(q, k, v)
    assert used == ["eager", "flex", "eager", "flex"]
    set_backend("flex")
    try:
        attention(q, k, v)
        assert used[-1] == "flex"
        assert len(used) == 5
    finally:
        set_backend("sdpa")


def test_recorded_maps():
    q, k, v = inputs()
    mask = masks()["one_row_without_keys"]
    with record_maps() as maps:
        first = attention(q, k, v, mask)
        attention(k, q, q)
    attention(q, k, v)
    assert [p.shape for p in maps] == [(B, A, N, M), (B, A, M, N)]
    torch.testing.assert_close(maps[0] @ v, first)
    want = torch.tensor([1.0, 0.0], dtype=torch.float64)[:, None, None].expand(B, A, N)
    torch.testing.assert_close(maps[0].sum(-1), want)  # the second sample has nothing to attend to
    assert not maps[0][~mask[:, None, None].expand_as(maps[0])].any()
    with record_maps(keep=lambda p: p.mean(1)) as means:
        attention(q, k, v, mask)
    torch.testing.assert_close(means[0], maps[0].mean(1))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda q, k, v: attention(q, k, v, backend="spda"),
            "unknown attention backend 'spda'; did you mean 'sdpa'?",
        ),
        (
            lambda q, k, v: set_backend("zzz"),
            "choose from cudnn, eager, efficient, flash, flash3, flex",
        ),
        (lambda q, k, v: use_backend("fleks").__enter__(), "did you mean 'flex'?"),
        (lambda q, k, v: attention(q, k, v, torch.ones(B, M)), "must be bool (True = attend), not float32"),
        (lambda q, k, v: attention(q.requires_grad_(), k, v, backend="flex"), "choose sdpa or eager"),
    ],
)
def test_errors(call, message):
    with pytest.raises(KitError) as error:
        call(*inputs())
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_missing_xformers(monkeypatch):
    monkeypatch.setattr(module, "_has_xformers", lambda: False)
    assert "xformers" not in backends()
    with pytest.raises(
        KitError, match=r"not installed \(pip install .*; choose from sdpa, eager, flex, flash"
    ):
        set_backend("xformers")


def test_xformers_without_a_kernel(monkeypatch):
    def refuse(*_, **__):
        raise NotImplementedError("No operator found for this input\n  query: shape=...\n  device: cpu")

    monkeypatch.setattr(sys.modules["xformers.ops"], "memory_efficient_attention", refuse)
    with pytest.raises(KitError) as error:
        attention(*inputs(), backend="xformers")
    assert "cannot run on cpu" in str(error.value)
    assert "\n" not in str(error.value)


def test_compiled_models_follow_a_switch():
    from torch._dynamo.testing import CompileCounter

    counter = CompileCounter()
    run = torch.compile(lambda *x: attention(*x), backend=counter, fullgraph=True)
    q, k, v = inputs()
    mask = masks()["keys"]
    want = reference(q, k, v, mask)
    for backend, graphs in (("sdpa", 1), ("eager", 2), ("sdpa", 2), ("eager", 2)):
        with use_backend(backend):
            torch.testing.assert_close(run(q, k, v, mask), want, atol=1e-12, rtol=0)
        assert counter.frame_count == graphs


@pytest.mark.parametrize("backend", ["sdpa", "eager", "flex"])
def test_own_values_make_the_map_the_identity_for_chosen_samples(backend):
    q, k, v = inputs()
    mask = torch.ones(B, M, dtype=torch.bool)
    mask[:, -1] = False  # own values do not go by the mask
    plain = attention(q, k, v, mask, backend=backend)
    with own_values(slice(1, 2)) as own:
        got = attention(q, k, v, mask, backend=backend)
        with own_values(slice(0, 1)):
            assert torch.equal(attention(q, k, v, mask, backend=backend), v[:, :, M - N :])
    assert own.calls == 2
    assert torch.equal(got[0], plain[0])
    assert torch.equal(got[1], v[1, :, M - N :])  # the queries' own keys come last
    assert torch.equal(attention(q, k, v, mask, backend=backend), plain)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("backend", ["sdpa", "eager", "flex"])
@pytest.mark.parametrize("mask", ["none", "keys", "one_row_without_keys"])
def test_kernels_on_the_gpu(backend, mask):
    """Head width 80, where a kernel's backward once gave NaN without a word."""
    g = torch.Generator().manual_seed(3)
    n, m, d = 77, 300, 80
    q, k, v = (torch.randn(B, A, s, d, generator=g) for s in (n, m, m))
    keep = {
        "none": None,
        "keys": torch.arange(m)[None] < torch.tensor([[m - 9], [1]]),
        "one_row_without_keys": torch.arange(m)[None] < torch.tensor([[m], [0]]),
    }[mask]
    results = []
    for device, dtype, name in (("cpu", torch.float64, "eager"), ("cuda", torch.float16, backend)):
        leaves = [x.to(device, dtype).requires_grad_() for x in (q, k, v)]
        out = attention(*leaves, None if keep is None else keep.to(device), backend=name)
        results.append([out, *torch.autograd.grad(out.square().sum(), leaves)])
    for want, got in zip(*results, strict=True):
        # fp16 keeps 11 bits; gradients with one key sum 77 terms
        torch.testing.assert_close(got.double().cpu(), want, atol=5e-2, rtol=2e-2)


def test_bfloat16_keeps_logits_in_float32():
    """Queries and keys with a large part in common: logits of 277 ± 10, which bfloat16 knows to within 1."""
    g = torch.Generator().manual_seed(4)
    q, k, v = (torch.randn(2, 3, 64, 32, generator=g) for _ in range(3))
    q, k, v = (x.bfloat16() for x in (q + 7.0, k + 7.0, v))
    with torch.no_grad():
        got = attention(q, k, v).double()
    logits = q.double() @ k.double().mT * 32**-0.5
    want = logits.softmax(-1) @ v.double()
    # weights and answer are rounded once each, by 2^-9 at most; with rounded logits the error is 50 times this
    assert (got - want).square().mean().sqrt() < 2 * 2**-9 * want.square().mean().sqrt()
