"""One optimiser step of a denoiser: forward, backward, AdamW; ours, and diffusers' model of the same weights."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from imagen_kit import denoisers, performance, schedules
from imagen_kit.bench.peers.models import PEERS, Peer, beside
from imagen_kit.bench.subject import OURS, Built, Subject, Unavailable
from imagen_kit.bench.subjects import register
from imagen_kit.bench.work import TORCH, Told, Way, Work, chosen_peers, random_inputs, random_network
from imagen_kit.conditioning import Cond
from imagen_kit.errors import KitError, unknown

MODES = ("eager", "compile", "compile_blocks")
DTYPES = ("fp32", "bf16")
Network = Callable[[Tensor, Tensor, Cond], Tensor]


@register("training", names=denoisers.names)
def training(
    name: str,
    device: torch.device,
    *,
    network: Mapping[str, Any] | None = None,
    resolution: int = 64,
    batch: int = 1,
    dtype: str = "fp32",
    channels_last: bool | None = None,
    mode: str = "eager",
    attention: str | None = None,
    checkpointing: bool = False,
    tokens: int = 77,
    peers: str = "all",
) -> Built:
    """Forward, backward and AdamW of a denoiser, by the loss that ``imagen_kit.training`` trains with.

    The answer is the loss, so that the second call's tells whether the same step was taken before it.

    Args:
        name: of the denoiser.
        device: where.
        network: its constructor's options.
        resolution: side of x, which for a latent model is that of the latents.
        batch: samples a step.
        dtype: fp32, or bf16: autocast, the weights staying float32.
        channels_last: memory format of convolutions, for all.
        mode: eager, compile or compile_blocks; of ours.
        attention: backend of ours.
        checkpointing: recompute activations in the backward pass, for all.
        tokens: text tokens, where it reads text.
        peers: all, none, or some of diffusers, diffusers compiled, imagen_pytorch, separated by commas.

    Raises:
        KitError: a value that there is not.
    """
    for what, value, choices in (("mode", mode, MODES), ("dtype", dtype, DTYPES)):
        if value not in choices:
            raise KitError(unknown(f"{what} of a training step", value, choices))
    wanted = chosen_peers(peers, PEERS)
    options = dict(network or {})
    if checkpointing:
        options["runtime"] = {**options.get("runtime", {}), "checkpointing": True}
    module = random_network(name, options, device).train()
    told = random_inputs(module, batch, resolution, tokens, device)
    others = beside(wanted, module, resolution)
    applied = performance.apply(module, Way("fp32", channels_last, mode, attention).performance, device)
    batch_of = _Batch(name, told, TORCH[dtype])
    built: Built = {OURS: batch_of.work(module, module, applied.words + f", autocast {dtype}")}
    for who, peer in others.items():
        built[who] = (
            peer if isinstance(peer, Unavailable) else _theirs(peer, batch_of, channels_last, checkpointing)
        )
    return built


def _theirs(
    peer: Peer, batch: _Batch, channels_last: bool | None, checkpointing: bool
) -> Subject | Unavailable:
    """A peer's step, its model copied: a step changes weights, and its neighbour starts from the same."""
    peer = replace(peer, model=copy.deepcopy(peer.model).train())
    peer.prepare(Way("fp32", channels_last))
    model: Any = peer.model
    if checkpointing and not hasattr(model, "enable_gradient_checkpointing"):
        return Unavailable(f"a {type(model).__name__} cannot recompute its activations")
    if checkpointing:
        model.enable_gradient_checkpointing()

    def network(through: Any) -> Network:
        return lambda x, t, cond: peer.call(Told(x, t, cond))(through)

    note = peer.note + f", autocast {batch.name_of_dtype}"
    work = batch.work(model, network(peer.run_by), note, network(model))
    work.comparable = peer.same
    return work


class _Batch:
    """What every step sees.

    Args:
        name: of the denoiser, whose published schedule and prediction the loss is of.
        told: x0, times and conditioning.
        dtype: of autocast.
    """

    def __init__(self, name: str, told: Told, dtype: torch.dtype):
        facts = denoisers.describe(name).get("sampling", {})
        self.schedule = schedules.create(**facts.get("schedule", {"name": "linear"}))
        self.prediction = facts.get("prediction", "eps")
        draw = torch.Generator().manual_seed(2)
        n, span = len(told.x), self.schedule.t_max - self.schedule.t_min
        self.t = self.schedule.t_min + span * torch.rand(n, generator=draw, dtype=torch.float64)
        self.noise = torch.randn(told.x.shape, generator=draw).to(told.x.device)
        self.told, self.dtype = told, dtype
        self.name_of_dtype = next(key for key, value in TORCH.items() if value is dtype)

    def work(self, module: nn.Module, network: Network, note: str, eager: Network | None = None) -> Subject:
        """A step of ``module``, which is called as ``network``."""
        from imagen_kit.training.config import OptimizerConfig
        from imagen_kit.training.diffusion import denoising_loss
        from imagen_kit.training.loop import optimizers

        (optimizer,) = optimizers(module, OptimizerConfig(learning_rate=1e-4))
        told, kind = self.told, self.told.x.device.type

        def step(network: Network) -> Tensor:
            with torch.enable_grad():
                with torch.autocast(kind, self.dtype, enabled=self.dtype is not torch.float32):
                    loss = denoising_loss(
                        network, self.schedule, self.prediction, told.x, self.noise, self.t, told.cond
                    )
                loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            return loss.detach().reshape(1)

        return Work(
            lambda: step(network),
            "pictures",
            len(told.x),
            modules=[module],
            inputs=[*told.tensors, self.noise],
            note=note,
            eager=lambda: step(eager or network),
            precision=self.name_of_dtype,
        )
