"""What every denoiser promises, whatever its architecture. A new denoiser needs a row in ``CASES``."""

from __future__ import annotations

import pytest
import torch

from imagen_kit import denoisers
from imagen_kit.conditioning import Cond
from imagen_kit.errors import KitError

LEVELS = [{"channels": 32, "blocks": 1}, {"channels": 64, "blocks": 1, "attention": True}]
UNET = {"levels": LEVELS, "head_dim": 16}
DIT = {"width": 64, "depth": 2, "heads": 4}
TEXT = {"context_dim": 12, "pooled_dim": 10, "text_depth": 1}
CLASSES = 5
# The family of ADM: its own style with labels, DDPM's, Stable Diffusion's with text, IF's super-resolution stage.
ADM_LEVELS = [{"channels": 32, "blocks": 1}, {"channels": 64, "blocks": 1, "attention": {"head_dim": 16}}]
SD_LEVELS = [{**level, "attention": {"kind": "transformer", "heads": 4}} for level in ADM_LEVELS]
IF_LEVELS = [ADM_LEVELS[0], {**ADM_LEVELS[1], "attention": {"head_dim": 16, "cells": False}}]
IF = {"context_dim": 12, "low_res_channels": 3, "embedding": {"text_width": 64, "text_heads": 3}}

EFFICIENT_LEVELS = [{"channels": 32, "blocks": 1}, {"channels": 64, "blocks": 2, "attention": {"heads": 4}}]
EFFICIENT = {"levels": EFFICIENT_LEVELS}

# Its two finest maps, of a quarter and an eighth of the side; tests/denoisers/test_timm_unet.py tries other families.
TIMM = {
    "backbone": {"name": "test_convnext", "indices": (0, 1)},
    "decoder": {"width": 32, "widest": 32, "blocks": 1, "head_dim": 16},
}

EDM2 = {"in_channels": 3, "levels": LEVELS, "head_dim": 16}

CASES = {
    "unet-plain": ("unet", UNET),
    "unet-labels": ("unet", {**UNET, "num_classes": CLASSES, "out_channels": 6}),
    "unet-text": ("unet", {**UNET, **TEXT}),
    "unet-sr": ("unet", {**UNET, **TEXT, "low_res_channels": 3, "patch_size": 2}),
    "adm-plain": ("adm", {"levels": ADM_LEVELS, "style": {"resample": "asymmetric", "groups": 8}}),
    "adm-labels": (
        "adm",
        {
            "levels": ADM_LEVELS,
            "style": {"resample": "residual", "groups": 8},
            "num_classes": CLASSES + 1,
            "out_channels": 6,
        },
    ),
    "adm-text": (
        "adm",
        {
            "levels": SD_LEVELS,
            "style": {"modulation": "shift", "resample": "conv", "groups": 8},
            "context_dim": 12,
            "pooled_dim": 10,
        },
    ),
    "adm-if": (
        "adm",
        {
            **IF,
            "levels": IF_LEVELS,
            "style": {"activation": "gelu", "resample": "residual", "groups": 8, "skip_scale": 0.7071},
        },
    ),
    "efficient-plain": ("efficient_unet", EFFICIENT),
    "efficient-labels": ("efficient_unet", {**EFFICIENT, "num_classes": CLASSES, "out_channels": 6}),
    "efficient-text": ("efficient_unet", {**EFFICIENT, **TEXT, "embed_dim": 48}),
    "efficient-sr": (
        "efficient_unet",
        {
            "levels": [
                EFFICIENT_LEVELS[0],
                {**EFFICIENT_LEVELS[1], "attention": {"heads": 4, "cells": False}},
            ],
            **TEXT,
            "low_res_channels": 3,
        },
    ),
    "timm-plain": ("timm_unet", TIMM),
    "timm-labels": ("timm_unet", {**TIMM, "num_classes": CLASSES, "out_channels": 6}),
    "timm-text": ("timm_unet", {**TIMM, **TEXT}),
    "timm-sr": ("timm_unet", {**TIMM, **TEXT, "low_res_channels": 3}),
    "edm2-plain": ("edm2", EDM2),
    "edm2-labels": ("edm2", {**EDM2, "num_classes": CLASSES, "out_channels": 6}),
    "dit-plain": ("dit", DIT),
    "dit-labels": ("dit", {**DIT, "num_classes": CLASSES, "learn_sigma": True}),
    "dit-text": ("dit", {**DIT, **TEXT}),
    "dit-sr": ("dit", {**DIT, **TEXT, "low_res_channels": 3, "patch_size": 4}),
    "mmdit-text": (
        "mmdit",
        {
            **DIT,
            "context_dim": 12,
            "pooled_dim": 10,
            "details": {"qk_norm": True, "dual_layers": [0], "grid": 16},
        },
    ),
    "flux-text": (
        "flux",
        {
            "width": 64,
            "depth": 1,
            "single_depth": 2,
            "heads": 4,
            "context_dim": 12,
            "pooled_dim": 10,
            "guidance": True,
        },
    ),
    "pixart-text": ("pixart", {**DIT, "context_dim": 12}),
    "pixart-compressed-text": (
        "pixart",
        {**DIT, "context_dim": 12, "details": {"compress": 2, "compressed": [1]}},
    ),
    "pixart-sizes": ("pixart", {**DIT, "width": 48, "context_dim": 12, "sizes": True, "null_tokens": 4}),
    "uvit-labels": (
        "uvit",
        {**DIT, "num_classes": CLASSES, "learn_sigma": True, "details": {"grid": 4}},
    ),
    "uvit-text": (
        "uvit",
        {**DIT, "context_dim": 12, "details": {"grid": 4, "text_tokens": 16, "conv": False}},
    ),
}
# Named sizes of a class above; tests/denoisers/test_dit.py counts their parameters.
SIZES = {f"dit_{size}_{patch}" for size in ("s", "b", "l", "xl") for patch in (2, 4, 8)}
# tests/denoisers/test_adm.py counts these.
SIZES |= {"adm_64", "adm_128", "adm_256", "adm_512", "adm_64_to_256", "adm_128_to_512", "ddpm_32", "ddpm_256"}
SIZES |= {"if_i_m", "if_i_l", "if_i_xl", "if_ii_l", "sd15_unet", "sd21_unet", "sdxl_unet", "sd_x4_unet"}
# tests/denoisers/test_efficient_unet.py counts these.
SIZES |= {"imagen_64", "imagen_64_to_256", "imagen_256_to_1024"}
# tests/denoisers/test_mmdit.py counts these.
SIZES |= {"sd3_medium", "sd35_medium", "sd35_large"}
# tests/denoisers/test_flux.py counts these.
SIZES |= {"flux_dev", "flux_schnell"}
# tests/denoisers/test_edm2.py counts these.
SIZES |= {f"edm2_{size}" for size in ("xs", "s", "m", "l", "xl", "xxl")}
# tests/denoisers/test_pixart.py counts these.
SIZES |= {"pixart_xl_2", "pixart_xl_2_1024", "pixart_xl_2_sigma", "pixart_xl_2_sigma_2k"}
# tests/denoisers/test_uvit.py counts these.
SIZES |= {"uvit_s", "uvit_s_deep", "uvit_m", "uvit_l", "uvit_h"}
# Closed formulas without weights; tests/denoisers/test_analytic.py judges them.
ANALYTIC = {"gaussian", "gaussian_mixture", "finite_data"}
# Networks that guide; tests/denoisers/test_adm_classifier.py judges and counts them.
CLASSIFIERS = {"adm_classifier", *(f"adm_classifier_{side}" for side in (64, 128, 256, 512))}
NO_CONVOLUTION = {"flux-text"}
ANY_SIDE = {"adm-plain", "adm-text"}  # take pictures of any side; see tests/denoisers/test_adm.py

RECOMPUTED = {
    "Unit",
    "MPBlock",
    "DiTBlock",
    "JointBlock",
    "DoubleBlock",
    "SingleBlock",
    "PixArtBlock",
    "UViTBlock",
}

every = pytest.mark.parametrize("case", CASES)
with_text = pytest.mark.parametrize("case", [c for c in CASES if c.endswith(("text", "sr", "sizes"))])


def build(case, seed=0, dtype=torch.float32, **options):
    """The network with every weight random: what starts at zero would hide faults."""
    name, config = CASES[case]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = denoisers.create(name, **{**config, **options})
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in network.parameters():
            noise = torch.randn(p.shape, generator=g)
            other = p + (0.1 * noise if p.ndim else 1.0)  # a gain that starts at zero must not stay near it
            p.copy_(noise * p[0].numel() ** -0.5 if p.ndim > 1 else other)
    return network.eval().to(dtype)


def inputs(case, b=2, h=8, w=16, n=6, seed=0, dtype=torch.float32):
    """x, t and everything the case can be told; the second prompt is two tokens shorter than the first."""
    _, config = CASES[case]
    g = torch.Generator().manual_seed(seed)

    def rand(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)

    parts = {}
    if "context_dim" in config:
        mask = torch.arange(n)[None] < torch.tensor([n, n - 2] * b)[:b, None]
        parts = {"tokens": rand(b, n, 12) * mask[..., None], "mask": mask}
    if "pooled_dim" in config:
        parts["pooled"] = rand(b, 10)
    if "num_classes" in config:
        parts["labels"] = torch.randint(0, CLASSES + 1, (b,), generator=g)
    if config.get("sizes"):
        parts["size"] = torch.tensor([[h, w, h / w]]).expand(b, 3) * 8
    if config.get("guidance"):
        parts["guidance"] = 1 + torch.rand(b, generator=g)
    if "low_res_channels" in config:
        parts |= {"low_res": rand(b, 3, h, w), "low_res_level": torch.rand(b, generator=g).to(dtype)}
    return rand(b, 3, h, w), torch.rand(b, generator=g) * 1000, Cond(**parts)


def changed(cond, **parts):
    """``cond`` with some parts replaced."""
    return Cond(**{**vars(cond), **parts})


def difference(a, b):
    """Largest difference relative to the spread of the answers."""
    return ((a - b).abs().max() / b.std()).item()


def test_every_denoiser_has_a_case():
    assert set(denoisers.names()) == {name for name, _ in CASES.values()} | SIZES | ANALYTIC | CLASSIFIERS


@every
@pytest.mark.parametrize(("h", "w"), [(8, 8), (8, 16), (24, 8)])
def test_shape(case, h, w):
    network = build(case)
    x, t, cond = inputs(case, h=h, w=w)
    with torch.no_grad():
        out = network(x, t, cond)
    assert out.shape == (2, network.out_channels, h, w)
    assert network.out_channels == (6 if case.endswith("labels") else 3)
    assert out.isfinite().all()


@every
def test_fresh_networks_answer_zero(case):
    name, config = CASES[case]
    x, t, cond = inputs(case)
    assert not denoisers.create(name, **config)(x, t, cond).any()


@every
def test_gradient_reaches_every_parameter(case):
    network = build(case).train()
    x, t, cond = inputs(case)
    out = network(x, t, cond)
    (out * torch.randn(out.shape, generator=torch.Generator().manual_seed(1))).sum().backward()
    # where rounding alone is left gradients are below 1e-5; the smallest real ones here are above 0.1
    silent = {k for k, p in network.named_parameters() if p.grad is None or p.grad.abs().max() < 1e-3}
    # a softmax ignores what is added to all its logits; no one reads the answers to the last block's text
    unheard = (".k_proj.bias", "joint_blocks.1.context_block.attn.ln_q.weight")
    assert {k for k in silent if not k.endswith(unheard)} == set()


@with_text
def test_padding_never_leaks(case):
    network = build(case)
    x, t, cond = inputs(case)
    longer = torch.nn.functional.pad(cond.mask, (0, 7))
    tokens = torch.nn.functional.pad(cond.tokens, (0, 0, 0, 7))
    garbage = torch.randn(tokens.shape, generator=torch.Generator().manual_seed(1)) * 30
    tokens = torch.where(longer[..., None], tokens, garbage)
    with torch.no_grad():
        want = network(x, t, cond)
        got = network(x, t, changed(cond, tokens=tokens, mask=longer))
        assert difference(got, want) < 1e-5  # another number of keys changes the order of sums
        # the mask is what keeps them out
        assert (
            difference(network(x, t, changed(cond, tokens=tokens, mask=torch.ones_like(longer))), want) > 1e-2
        )


@with_text
def test_text_is_read_and_dropped_text_is_not(case):
    network = build(case)
    x, t, cond = inputs(case)
    other = torch.randn(cond.tokens.shape, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        conditional = network(x, t, cond)
        parts = [{"tokens": other * cond.mask[..., None]}]
        if cond.pooled is not None:
            parts.append({"pooled": -cond.pooled})
        for part in parts:
            assert difference(network(x, t, changed(cond, **part)), conditional) > 1e-2
        dropped = {"mask": torch.zeros_like(cond.mask)}
        if cond.pooled is not None:
            dropped["pooled"] = torch.zeros_like(cond.pooled)
        unconditional = network(x, t, changed(cond, **dropped))
        assert unconditional.isfinite().all()
        assert difference(unconditional, conditional) > 1e-2
        torch.testing.assert_close(network(x, t, changed(cond, tokens=other, **dropped)), unconditional)


@with_text
def test_dropped_text_has_finite_gradients(case):
    network = build(case).train()
    x, t, cond = inputs(case)
    network(x, t, changed(cond, mask=torch.zeros_like(cond.mask))).square().sum().backward()
    assert all(p.grad.isfinite().all() for p in network.parameters() if p.grad is not None)


@every
def test_every_other_input_is_read(case):
    network = build(case)
    x, t, cond = inputs(case)
    others = {"labels": (cond.labels, lambda v: (v + 1) % CLASSES), "low_res": (cond.low_res, torch.neg)}
    others["low_res_level"] = (cond.low_res_level, lambda v: 1 - v)
    others["guidance"] = (cond.guidance, lambda v: v + 2)
    others["size"] = (cond.size, lambda v: v * 2)
    with torch.no_grad():
        want = network(x, t, cond)
        assert difference(network(-x, t, cond), want) > 1e-2
        assert difference(network(x, 1000 - t, cond), want) > 1e-2
        for name, (value, change) in others.items():
            if value is not None:
                assert difference(network(x, t, changed(cond, **{name: change(value)})), want) > 1e-2, name


@every
def test_a_picture_does_not_depend_on_its_batch(case):
    network = build(case)
    x, t, cond = inputs(case, b=4)
    with torch.no_grad():
        together = network(x, t, cond)
        alone = torch.cat([network(x[i : i + 1], t[i : i + 1], cond[i : i + 1]) for i in range(4)])
    assert difference(alone, together) < 1e-5  # matrix kernels sum in another order for another batch


@every
def test_time_scale(case):
    x, t, cond = inputs(case)
    with torch.no_grad():
        want = build(case)(x, t, cond)
        got = build(case, time_scale=1000.0)(x, t / 1000, cond)
    assert difference(got, want) < 1e-3  # t/1000·1000 is off by 1e-7 of 1000 rad in the highest frequency


@every
def test_checkpointing_recomputes_and_changes_nothing(case):
    x, t, cond = inputs(case)
    results, calls = [], []
    for checkpointing in (False, True):
        network = build(case, runtime={"checkpointing": checkpointing}).train()
        count = []
        for module in network.modules():
            if type(module).__name__ in RECOMPUTED:
                module.register_forward_pre_hook(lambda *_, count=count: count.append(1))
        out = network(x, t, cond)
        out.square().mean().backward()
        results.append([out, *(p.grad for p in network.parameters())])
        calls.append(len(count))
    assert calls[1] == 2 * calls[0] > 0
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, atol=1e-6, rtol=1e-5)  # the same operations on the same numbers


@pytest.mark.parametrize("case", [c for c in CASES if c not in NO_CONVOLUTION])
def test_channels_last_changes_nothing(case):
    network = build(case, runtime={"channels_last": True})
    four_dimensional = [p for p in network.parameters() if p.ndim == 4 and p.shape[-1] > 1]
    assert four_dimensional
    assert all(p.is_contiguous(memory_format=torch.channels_last) for p in four_dimensional)
    x, t, cond = inputs(case)
    with torch.no_grad():
        assert (
            difference(network(x, t, cond), build(case)(x, t, cond)) < 1e-5
        )  # other kernels, other order of sums


@every
def test_bfloat16_is_close_to_float32(case):
    x, t, cond = inputs(case)
    with torch.no_grad():
        want = build(case)(x, t, cond)
        half = changed(cond.to(dtype=torch.bfloat16), low_res_level=cond.low_res_level)  # a level is a time
        got = build(case, dtype=torch.bfloat16)(x.bfloat16(), t, half)
    assert got.dtype == torch.bfloat16
    # bf16 rounds to 2^-9; some tens of layers with random weights add up to one or two per cent
    assert ((got.float() - want).norm() / want.norm()).item() < 0.03


@pytest.mark.parametrize(
    "case", [pytest.param(c, marks=[] if c.endswith(("sr", "if")) else pytest.mark.slow) for c in CASES]
)
def test_compiles_as_one_graph_and_once(case):
    network = build(case)
    compiled = torch.compile(network, backend="eager", fullgraph=True, dynamic=False)
    with torch.no_grad():
        for seed in (0, 1):
            x, t, cond = inputs(case, seed=seed)
            with torch.compiler.set_stance("fail_on_recompile" if seed else "default"):
                assert difference(compiled(x, t, cond), network(x, t, cond)) < 1e-5
    torch.compiler.reset()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "smaller"), [("unet-text", {"levels": LEVELS[1:], "text_depth": 0}), ("dit-text", {"depth": 1})]
)
def test_compiled_kernels_agree(case, smaller):
    network = build(case, **smaller)
    x, t, cond = inputs(case)
    with torch.no_grad():
        compiled = torch.compile(network, fullgraph=True, dynamic=False)
        assert difference(compiled(x, t, cond), network(x, t, cond)) < 1e-4  # fused kernels round elsewhere
    torch.compiler.reset()


@every
def test_missing_conditioning_is_named(case):
    network = build(case)
    x, t, cond = inputs(case)
    needed = ("tokens", "labels", "low_res", "low_res_level", "size", "guidance")
    needed = [k for k in needed if getattr(cond, k) is not None]
    for part in needed:
        with pytest.raises(KitError, match=part.split("_level")[0]) as error:
            network(x, t, changed(cond, **{part: None}))
        assert "\n" not in str(error.value)
    if needed:
        with pytest.raises(KitError):
            network(x, t)


@pytest.mark.parametrize("case", [c for c in CASES if c not in ANY_SIDE])
def test_sides_that_do_not_divide(case):
    x, t, cond = inputs(case, h=9, w=8)
    with pytest.raises(KitError, match=r"9×8: sides must be multiples of [248]$"):
        build(case)(x, t, cond)


@pytest.mark.parametrize("name", ["unet", "dit"])
def test_unknown_runtime_option(name):
    with pytest.raises(KitError, match="checkpointing"):
        denoisers.create(name, runtime={"checkpoint": True})
