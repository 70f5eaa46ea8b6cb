"""DiT as its authors sample it, by diffusers' model and scheduler, in the loop of its pipeline.

``DiTPipeline`` itself guides all channels and leaves the learned variance out; here both are as in our stage.

Axes: b pictures, c h w latents.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from imagen_kit.bench.peers.scheduling import scheduler_for
from imagen_kit.guidance.cfg import CFG
from imagen_kit.stage import Stage


def needed(stage: Stage) -> bool:
    """Whether ``DiTPipeline`` cannot do what the stage does."""
    limited = any(isinstance(s, CFG) and s.channels is not None for s in stage.guidance)
    return limited or getattr(stage.sampler, "variance", None) == "learned_range"


def painter(
    stage: Stage, model: nn.Module, codec: Any, given: Any, run_by: Callable[..., Any]
) -> tuple[Callable[..., Tensor], str]:
    """(a function that draws, by the network it may be handed; what it is in words); see ``pipelines.painter``."""
    scheduler = scheduler_for(stage)
    learned = getattr(scheduler.config, "variance_type", "") == "learned_range"
    cfg = next((s for s in stage.guidance if isinstance(s, CFG)), None)
    noise = given.noise.to(next(model.parameters()).dtype)
    labels, c = given.cond.labels, noise.shape[1]
    if cfg is not None:
        labels = torch.cat([given.cond.labels, given.uncond.labels])

    @torch.no_grad()
    def paint(through: Callable[..., Any] = run_by) -> Tensor:
        generators, x = given.generators(), noise
        scheduler.set_timesteps(given.steps, device=x.device)
        for t in scheduler.timesteps:
            seen = x if cfg is None else torch.cat([x, x])
            said = through(seen, timestep=t.expand(len(seen)), class_labels=labels, return_dict=False)[0]
            if cfg is not None:
                cond, uncond = said.chunk(2)
                n = c if cfg.channels is None else cfg.channels
                guided = uncond[:, :n] + cfg.scale * (cond[:, :n] - uncond[:, :n])
                said = torch.cat([guided, cond[:, n:]], dim=1)
            answer = said if learned else said[:, :c]
            x = scheduler.step(answer, t, x, generator=generators, return_dict=False)[0]
        decoded = codec.decode(x / codec.config.scaling_factor, return_dict=False)[0]
        return (decoded / 2 + 0.5).clamp(0, 1).float()

    return (
        paint,
        f"{type(scheduler).__name__} in the loop of DiTPipeline, with our guided channels and variance",
    )
