"""Every peer with our weights gives our answer: what is timed beside each other is the same work."""

from __future__ import annotations

import pytest
import torch
from tiny_cases import KL, NETWORKS, OWN, SIDE

from imagen_kit import denoisers
from imagen_kit.bench.peers import structure
from imagen_kit.bench.subject import OURS, Case, Subject, Unavailable
from imagen_kit.bench.subjects import build
from imagen_kit.checkpoints.loading import Origin, hollow

pytest.importorskip("diffusers")
pytestmark = pytest.mark.parity
CPU = torch.device("cpu")
EQUAL = 1e-4  # of the root mean square: float32 on both sides, sums in another order
SYSTEMS = ["sd15", "sdxl", "pixart-alpha", "sd3-medium", "flux-dev", "dit-xl-2-256", "deepfloyd-if"]


def built(kind, name, **options):
    return build(Case(kind, name, options), CPU)


def differences(subjects):
    """Of every peer that says it is comparable, over the root mean square of our answer."""
    outs = {}
    for who, subject in subjects.items():
        assert isinstance(subject, Subject), (who, subject)
        outs[who] = (subject(), subject.comparable)
    ours, _ = outs.pop(OURS)
    assert ours.abs().max() > 0
    assert ours.isfinite().all()
    scale = ours.double().square().mean().sqrt()
    return {
        who: float((out.double() - ours.double()).abs().max() / scale)
        for who, (out, comparable) in outs.items()
        if comparable
    }


@pytest.mark.parametrize("what", NETWORKS)
def test_networks(what):
    name, options = NETWORKS[what]
    found = built("denoiser", name, network=options, peers="diffusers", **SIDE)
    assert found["diffusers"].note.startswith(what.split()[0])
    assert found[OURS]().std() > 0.1
    assert differences(found)["diffusers"] < EQUAL
    ratio = found["diffusers"].flops() / found[OURS].flops()
    assert ratio == pytest.approx(1, abs=0.05)  # DiT's there embeds time and label in every block


@pytest.mark.parametrize("what", NETWORKS)
def test_constructor_arguments_are_read_off_a_network(what):
    """Built anew from them, the network has the same tensors."""
    name, options = NETWORKS[what]
    with torch.device("meta"):
        network = denoisers.create(name, **options)
    found = structure.origin(network)
    again = hollow(Origin("denoiser", found.part, found.kwargs))
    shapes = [{key: value.shape for key, value in n.state_dict().items()} for n in (network, again)]
    assert shapes[0] == shapes[1]


@pytest.mark.parametrize(
    "size", ["sd15_unet", "sdxl_unet", "if_i_l", "if_ii_l", "ddpm_32", "dit_s_2", "pixart_xl_2_1024"]
)
def test_published_sizes_have_a_twin(size):
    """Without memory: the layout takes every tensor, and diffusers' model has exactly those."""
    from imagen_kit.bench.peers.networks import twin

    with torch.device("meta"):
        network = denoisers.create(size, **({"num_classes": 1000} if size == "dit_s_2" else {}))
    with torch.device("meta"):
        model = twin(network, 32)
    own, theirs = (sum(p.numel() for p in module.parameters()) for module in (network, model))
    assert theirs == own


def test_times_are_told_in_the_networks_own_scale():
    """A network on a flow schedule is told t in [0, 1] and multiplies it by 1000 itself; its twin gets 1000·t."""
    name, options = NETWORKS["SD3Transformer2DModel"]
    found = built("denoiser", name, network={**options, "time_scale": 1000.0}, peers="diffusers", **SIDE)
    assert differences(found)["diffusers"] < EQUAL


@pytest.mark.parametrize(
    "what", ["UNet2DConditionModel sd15", "DiTTransformer2DModel official", "FluxTransformer2DModel"]
)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_training_steps(what, checkpointing):
    """The loss after one step: the same gradients and the same update before it."""
    name, options = NETWORKS[what]
    found = built("training", name, network=options, checkpointing=checkpointing, peers="diffusers", **SIDE)
    before = {who: subject().item() for who, subject in found.items()}
    after = {who: subject().item() for who, subject in found.items()}
    assert before["diffusers"] == pytest.approx(before[OURS], rel=1e-5)
    assert after["diffusers"] == pytest.approx(after[OURS], rel=1e-4)
    assert after[OURS] < before[OURS] * (1 - 1e-3)  # it learns the batch


@pytest.mark.parametrize("work", ["encode", "decode"])
def test_codecs(work):
    found = built(
        "codec", "kl", options={**KL, "shift": 0.3}, work=work, resolution=16, batch=2, peers="diffusers"
    )
    assert differences(found)["diffusers"] < EQUAL


def test_tiles_are_not_compared_with_the_whole():
    found = built("codec", "kl", options=KL, resolution=32, tile=8, peers="diffusers")
    assert not found["diffusers"].comparable
    assert found[OURS].flops() > found["diffusers"].flops()  # tiles overlap


@pytest.mark.parametrize(
    ("name", "options"), [("t5", {"length": 12}), ("clip", {"length": 9}), ("open_clip", {})]
)
def test_text_encoders(name, options):
    found = built("text_encoder", name, batch=2, **options)
    assert next(iter(differences(found).values())) < EQUAL
    assert found[OURS].flops() == next(found[who].flops() for who in found if who != OURS)


def test_samplers_of_k_diffusion():
    pytest.importorskip("k_diffusion")
    for name in ("euler", "heun", "dpm2", "lms", "dpmpp_2m"):
        found = differences(built("sampler", name, steps=6, resolution=8))
        assert found.keys() == {"k_diffusion"}
        assert found["k_diffusion"] < EQUAL


@pytest.mark.parametrize("name", SYSTEMS)
def test_whole_recipes(name):
    found = built("recipe", name, size="tiny", steps=3, batch=2, peers="diffusers")
    ours, theirs = found[OURS](), found["diffusers"]()
    assert ours.std() > 0.05
    assert ((ours > 0) & (ours < 1)).float().mean() > 0.2  # not all is cut off at black or white
    assert not torch.allclose(ours[0], ours[1], atol=0.05)
    assert (theirs - ours).abs().max() < EQUAL
    assert found["diffusers"].comparable


def test_dit_by_diffusers_own_pipeline():
    found = built(
        "recipe",
        "dit-xl-2-256",
        size="tiny",
        steps=3,
        sampler="DDIMScheduler",
        set=["stages.0.guidance=[{name: cfg, scale: 4.0}]"],
        peers="diffusers",
    )
    assert found["diffusers"].note.startswith("DiTPipeline")
    assert differences(found)["diffusers"] < EQUAL


def test_sampler_and_guidance_of_a_case_reach_both():
    plain = built("recipe", "sd15", size="tiny", steps=3, peers="none")
    other = built(
        "recipe",
        "sd15",
        size="tiny",
        steps=3,
        sampler="DPMSolverMultistepScheduler",
        guidance=2.0,
        peers="diffusers",
    )
    assert "DPMSolverMultistepScheduler" in other["diffusers"].note
    assert differences(other)["diffusers"] < EQUAL
    assert (plain[OURS]() - other[OURS]()).abs().max() > 0.01


def test_half_precision_is_close_and_says_so():
    found = built("recipe", "sd15", size="tiny", steps=3, dtype="bf16", peers="diffusers")
    assert "bfloat16" in found["diffusers"].note
    assert 1e-4 < differences(found)["diffusers"] < 0.3  # eight bits of mantissa, guided over three steps


@pytest.mark.parametrize("what", OWN)
def test_networks_of_our_own_have_a_neighbour(what):
    name, options = OWN[what]
    found = built("denoiser", name, network=options, peers="diffusers,imagen_pytorch", **SIDE)
    assert isinstance(found["diffusers"], Unavailable)
    assert "no community format" in found["diffusers"].reason
    other = found["imagen_pytorch"]
    if isinstance(other, Unavailable):
        pytest.skip(other.reason)
    assert not other.comparable
    assert "another network" in other.note
    assert other().shape == found[OURS]().shape
    assert other.flops() > 0
