"""diffusers' models as our denoisers, and its schedules as ours."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_pipelines import diffusers, sd3_transformer, seeded, unet

from imagen_kit import schedules
from imagen_kit.conditioning import Cond
from imagen_kit.errors import KitError
from imagen_kit.interop import diffusers as interop
from imagen_kit.interop.diffusers_model import pack, unpack

G = torch.Generator().manual_seed(0)
X = torch.randn(2, 4, 8, 8, generator=G)
TEXT = torch.randn(2, 5, 16, generator=G)
MASK = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]], dtype=torch.bool)
T = torch.tensor([900.0, 40.0])


def same(got: torch.Tensor, want: torch.Tensor) -> None:
    assert want.std() > 0.01
    torch.testing.assert_close(got, want, rtol=0, atol=0)  # the same call


def test_unet_with_text_and_mask() -> None:
    want = unet()(X, T, encoder_hidden_states=TEXT, encoder_attention_mask=MASK).sample
    same(interop.denoiser(unet())(X, T, Cond(tokens=TEXT, mask=MASK)), want)


def test_unet_with_pooled_text_and_sizes() -> None:
    model, size = unet(sdxl=True), torch.tensor([[64.0, 64, 0, 0, 64, 64]] * 2)
    pooled = torch.randn(2, 10, generator=torch.Generator().manual_seed(1))
    added = {"text_embeds": pooled, "time_ids": size}
    want = model(X, T, encoder_hidden_states=TEXT, added_cond_kwargs=added).sample
    same(interop.denoiser(model)(X, T, Cond(tokens=TEXT, pooled=pooled, size=size)), want)
    with pytest.raises(KitError, match=r"needs cond\.pooled and cond\.size"):
        interop.denoiser(model)(X, T, Cond(tokens=TEXT))


def test_super_resolution_unet_with_a_noise_level() -> None:
    model = seeded(
        lambda: diffusers.UNet2DModel(
            sample_size=8, in_channels=8, out_channels=4, block_out_channels=(8, 16), layers_per_block=1,
            norm_num_groups=4, attention_head_dim=8, down_block_types=("DownBlock2D",) * 2,
            up_block_types=("UpBlock2D",) * 2, class_embed_type="timestep",
        )
    )  # fmt: skip
    low, level = (
        torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1)),
        torch.tensor([0.1, 0.25]),
    )
    want = model(torch.cat([X, low], 1), T, class_labels=level * 1000).sample
    same(interop.denoiser(model)(X, T, Cond(low_res=low, low_res_level=level)), want)
    with pytest.raises(KitError, match="takes no encoder_hidden_states"):
        interop.denoiser(model)(X, T, Cond(tokens=TEXT))


def test_dit_with_labels() -> None:
    model = seeded(
        lambda: diffusers.DiTTransformer2DModel(
            sample_size=8, num_layers=1, num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8,
            num_embeds_ada_norm=10, norm_num_groups=8,
        )
    )  # fmt: skip
    labels = torch.tensor([3, 7])
    want = model(X, T, class_labels=labels).sample
    same(interop.denoiser(model)(X, T, Cond(labels=labels)), want)
    assert want.shape[1] == 8  # a learned variance, which denoise_fn leaves out


@pytest.mark.parametrize("told", [False, True])
def test_pixart(told: bool) -> None:
    model = seeded(
        lambda: diffusers.PixArtTransformer2DModel(
            sample_size=8, num_layers=1, num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=8,
            cross_attention_dim=24, caption_channels=16, use_additional_conditions=told,
        )
    )  # fmt: skip
    size = torch.tensor([[64.0, 64.0, 1.0], [32.0, 64.0, 0.5]])
    added = {"resolution": size[:, :2], "aspect_ratio": size[:, 2:]} if told else dict.fromkeys(
        ("resolution", "aspect_ratio")
    )  # fmt: skip
    want = model(
        X, encoder_hidden_states=TEXT, timestep=T, encoder_attention_mask=MASK, added_cond_kwargs=added
    ).sample
    same(interop.denoiser(model)(X, T, Cond(tokens=TEXT, mask=MASK, size=size if told else None)), want)


def test_sd3_is_told_a_thousand_t() -> None:
    text, pooled = torch.randn(2, 5, 32, generator=G), torch.randn(2, 64, generator=G)
    t = torch.tensor([0.9, 0.25])
    want = sd3_transformer()(
        X, encoder_hidden_states=text, pooled_projections=pooled, timestep=t * 1000
    ).sample
    cond = Cond(tokens=text, pooled=pooled, mask=MASK)
    same(interop.denoiser(sd3_transformer())(X, t, cond), want)
    told = interop.denoiser(sd3_transformer(), time_scale=1.0)(X, t * 1000, cond)
    torch.testing.assert_close(told, want, rtol=0, atol=1e-5)  # t · 1000 rounded elsewhere


def test_flux_packs_and_unpacks() -> None:
    model = seeded(
        lambda: diffusers.FluxTransformer2DModel(
            patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16,
            num_attention_heads=2, joint_attention_dim=16, pooled_projection_dim=10, axes_dims_rope=(4, 4, 8),
            guidance_embeds=True,
        )
    )  # fmt: skip
    pooled, t = torch.randn(2, 10, generator=torch.Generator().manual_seed(1)), torch.tensor([0.9, 0.25])
    pipeline = diffusers.FluxPipeline
    want = model(
        hidden_states=pipeline._pack_latents(X, 2, 4, 8, 8),
        encoder_hidden_states=TEXT,
        pooled_projections=pooled,
        timestep=t,
        img_ids=pipeline._prepare_latent_image_ids(2, 4, 4, "cpu", torch.float32),
        txt_ids=torch.zeros(5, 3),
        guidance=torch.full((2,), 2.5),
    ).sample
    want = pipeline._unpack_latents(want, 64, 64, 8)
    same(interop.denoiser(model, embedded_guidance=2.5)(X, t, Cond(tokens=TEXT, pooled=pooled)), want)
    torch.testing.assert_close(unpack(pack(X), 8, 8), X, rtol=0, atol=0)
    with pytest.raises(KitError, match="must be even"):
        pack(X[..., :7])


def test_half_precision_models_take_float32_states() -> None:
    model = seeded(lambda: diffusers.UNet2DModel(
        sample_size=8, in_channels=4, out_channels=4, block_out_channels=(8,), layers_per_block=1, norm_num_groups=4,
        down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",),
    )).bfloat16()  # fmt: skip
    answer = interop.denoiser(model)(X, T)
    assert answer.dtype == torch.float32
    assert answer.isfinite().all()


@pytest.mark.parametrize(
    ("kind", "config"),
    [
        ("DDPMScheduler", {}),
        ("DDPMScheduler", {"beta_schedule": "scaled_linear", "num_train_timesteps": 500}),
        ("DDPMScheduler", {"beta_schedule": "squaredcos_cap_v2"}),
        ("DDPMScheduler", {"beta_schedule": "sigmoid"}),
        ("DDPMScheduler", {"beta_schedule": "laplace"}),
        ("DDPMScheduler", {"trained_betas": torch.linspace(1e-3, 2e-2, 100).tolist()}),
        ("DDIMScheduler", {"beta_schedule": "scaled_linear", "rescale_betas_zero_snr": True}),
        ("HeunDiscreteScheduler", {"beta_schedule": "exp"}),
    ],
)
def test_schedules_are_theirs(kind: str, config: dict[str, Any]) -> None:
    theirs = getattr(diffusers, kind)(**config)
    ours, prediction = interop.schedule(theirs)
    assert prediction == "eps"
    assert ours.discrete == len(theirs.alphas_cumprod)
    # their products of a thousand float32 factors are off by 1000 · 6e-8 at most
    torch.testing.assert_close(ours.alphas_cumprod.float(), theirs.alphas_cumprod, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("config", "name", "prediction"),
    [
        ({"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}, "flow", "flow"),
        ({"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}, "flow", "flow"),
        ({"_class_name": "EDMEulerScheduler", "sigma_max": 40.0, "sigma_data": 0.7}, "edm", "edm"),
        ({"prediction_type": "v_prediction"}, "linear", "v"),
        ({"prediction_type": "sample"}, "linear", "x0"),
    ],
)
def test_kinds_of_networks(config: dict[str, Any], name: str, prediction: str) -> None:
    schedule, said = interop.schedule(config)
    assert (schedule.name, said) == (name, prediction)
    if name == "flow":
        assert schedule.shift == 3.0
    if name == "edm":
        assert (schedule.t_max, schedule.sigma_data) == (40.0, 0.7)


def test_a_negative_network_is_refused_where_it_cannot_be_told() -> None:
    with pytest.raises(KitError, match="negate it"):
        interop.schedule({"_class_name": "EDMEulerScheduler", "prediction_type": "v_prediction"})


def test_a_schedule_object_is_what_it_was() -> None:
    assert schedules.create("linear").alphas_cumprod.equal(interop.schedule({})[0].alphas_cumprod)
