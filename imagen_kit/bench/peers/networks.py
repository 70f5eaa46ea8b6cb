"""diffusers' model for one of our networks, with the same weights, called with the same inputs.

    theirs = twin(network)                  # UNet2DConditionModel, DiTTransformer2DModel, ...
    answer = call(theirs, told)()           # what network(told.x, told.times, told.cond) answers

Weights go through the rules of ``imagen_kit.checkpoints``, so a network that no file of diffusers could hold has no
twin. One is made to fit: the official DiT embeds time and label once, diffusers' DiT once in every block and with
sinusoids shifted by one; in its twin all blocks share one embedder, which each of them runs, and its shift is ours.

Axes: b batch, c channels, h w picture.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from imagen_kit.bench.peers import library
from imagen_kit.bench.peers.structure import origin
from imagen_kit.bench.work import Told, time_scale
from imagen_kit.checkpoints.rules import to_foreign
from imagen_kit.checkpoints.writing import format_for
from imagen_kit.denoisers.layers.joint import from_patches, to_patches
from imagen_kit.errors import KitError
from imagen_kit.hollow import hollow_parameters

FLOW = 1000  # diffusers' flow models count time from 0 to this


def twin(network: nn.Module, side: int) -> nn.Module:
    """diffusers' model with copies of the weights of ``network``, in their dtype and on their device.

    Args:
        network: a denoiser of ours, or a ``kl`` codec.
        side: of x; diffusers' DiT stretches its positions to the side that it was made for.

    Raises:
        KitError: diffusers is not installed, or has no model that computes the same.
    """
    diffusers = library("diffusers")
    found = origin(network)
    kwargs, state = {**found.kwargs, "_size": side}, dict(network.state_dict())
    official = found.part == "dit" and not kwargs["details"]["block_embedders"]
    if official:
        kwargs, state = _dit_with_block_embedders(kwargs, state)
    format = format_for(type(found)(found.kind, found.part, kwargs, found.format), "diffusers")
    tensors = to_foreign(format.rules(kwargs), state)
    config = format.config(kwargs) if format.config else {}
    try:
        with hollow_parameters():
            model = getattr(diffusers, format.classes[0])(**config)
    except (TypeError, ValueError) as error:  # a combination that its parts do not take
        line = " ".join(str(error).split())
        raise KitError(f"diffusers' {format.classes[0]} cannot be built like this: {line}") from error
    copies = {
        name: value.detach().clone(memory_format=torch.contiguous_format) for name, value in tensors.items()
    }
    model.load_state_dict(copies, assign=True)
    if found.part == "dit":
        first = model.transformer_blocks[0].norm1.emb
        for block in model.transformer_blocks:
            if official:  # one set of weights, which a training step moves as it moves ours
                block.norm1.emb = first
            block.norm1.emb.time_proj.downscale_freq_shift = found.kwargs["details"]["frequency_shift"]
            block.norm1.emb.class_embedder.dropout_prob = 0  # ours drops labels where batches are made
    device = next(iter(copies.values())).device
    return model.to(device).train(network.training)


def _dit_with_block_embedders(
    kwargs: Mapping[str, Any], state: dict[str, Tensor]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Arguments and weights of the DiT that computes the same with embedders of its own in every block."""
    details = {**kwargs["details"], "block_embedders": True, "frequency_shift": 1.0}
    outside = {name for name in state if name.startswith(("t_embedder.", "y_embedder."))}
    own = {f"embedders.{i}.{name}": state[name] for i in range(kwargs["depth"]) for name in outside}
    kept = {name: value for name, value in state.items() if name not in outside}
    return {**kwargs, "details": details}, {**kept, **own}


def call(model: nn.Module, told: Told, network: nn.Module) -> Callable[..., Tensor]:
    """``model`` as a function of no argument that answers as ``network`` does, (b, c, h, w).

    Args:
        model: the twin of ``network``.
        told: what ours is called with; brought into the form that the model's pipeline gives it beforehand.
        network: ours, which tells how it scales its times.

    The function takes, as an option, what to call in the model's place: the model compiled.

    Raises:
        KitError: a model that is not one of those in ``CALLS``.
    """
    kind = type(model).__name__
    if kind not in CALLS:
        raise KitError(f"there is no way here to call a {kind}; only {', '.join(CALLS)}")
    arguments = CALLS[kind](told, told.times * time_scale(network), model)
    patch, (h, w) = getattr(network, "patch_size", 1), told.x.shape[-2:]

    def run(run_by: Callable[..., Any] = model) -> Tensor:
        answer = run_by(**arguments, return_dict=False)[0]
        if kind == "FluxTransformer2DModel":
            return from_patches(answer, h // patch, w // patch, patch, channels_first=True)
        return answer

    return run


def _unet_condition(told: Told, times: Tensor, model: Any) -> dict[str, Any]:
    x, cond, labels = told.x, told.cond, told.cond.labels
    if cond.low_res is not None:
        x = torch.cat([x, cond.low_res], dim=1)
        if labels is None and cond.low_res_level is not None:
            labels = cond.low_res_level * FLOW  # IF tells its noise level as a time
    added = None
    if cond.size is not None:
        added = {"text_embeds": cond.pooled, "time_ids": cond.size}
    return {
        "sample": x,
        "timestep": times,
        "encoder_hidden_states": cond.tokens,
        "encoder_attention_mask": cond.mask,
        "class_labels": labels,
        "added_cond_kwargs": added,
    }


def _unet(told: Told, times: Tensor, model: Any) -> dict[str, Any]:
    return {"sample": told.x, "timestep": times, "class_labels": told.cond.labels}


def _dit(told: Told, times: Tensor, model: Any) -> dict[str, Any]:
    return {"hidden_states": told.x, "timestep": times, "class_labels": told.cond.labels}


def _pixart(told: Told, times: Tensor, model: Any) -> dict[str, Any]:
    cond, size = told.cond, told.cond.size
    return {
        "hidden_states": told.x,
        "encoder_hidden_states": cond.tokens,
        "encoder_attention_mask": cond.mask,
        "timestep": times,
        "added_cond_kwargs": {
            "resolution": None if size is None else size[:, :2],
            "aspect_ratio": None if size is None else size[:, 2:],
        },
    }


def _sd3(told: Told, times: Tensor, model: Any) -> dict[str, Any]:
    return {
        "hidden_states": told.x,
        "encoder_hidden_states": told.cond.tokens,
        "pooled_projections": told.cond.pooled,
        "timestep": times,
    }


def _flux(told: Told, times: Tensor, model: Any) -> dict[str, Any]:
    h, w = (side // 2 for side in told.x.shape[-2:])
    tokens = told.cond.tokens
    assert tokens is not None
    rows, columns = (torch.arange(n, dtype=torch.float32, device=told.x.device) for n in (h, w))
    return {
        "hidden_states": to_patches(told.x, 2),
        "encoder_hidden_states": tokens,
        "pooled_projections": told.cond.pooled,
        "timestep": times / FLOW,
        "img_ids": torch.cartesian_prod(rows.new_zeros(1), rows, columns).to(told.x.dtype),
        "txt_ids": tokens.new_zeros(tokens.shape[1], 3),
        "guidance": told.cond.guidance,
    }


#: diffusers' class → (inputs, times that it is told, model) → its arguments.
CALLS: dict[str, Callable[[Told, Tensor, Any], dict[str, Any]]] = {
    "UNet2DConditionModel": _unet_condition,
    "UNet2DModel": _unet,
    "DiTTransformer2DModel": _dit,
    "PixArtTransformer2DModel": _pixart,
    "SD3Transformer2DModel": _sd3,
    "FluxTransformer2DModel": _flux,
}
