"""Skip-layer guidance, as Stable Diffusion 3.5 medium samples (Hyung et al. 2024 for video)."""

from __future__ import annotations

from dataclasses import dataclass

from imagen_kit.guidance import register
from imagen_kit.guidance.layers import LayerGuidance


@register("slg", extra_evaluations="1 (skipped); none at scale 0", works_in="raw")
@dataclass(frozen=True)
class SLG(LayerGuidance):
    """cond + scale·(cond − skipped); skipped: the network without some of its residual blocks.

    It adds up with CFG. Stable Diffusion 3.5 medium skips blocks 7, 8 and 9 at scale 2.5 in 1 to 20 % of the
    steps: ``{name: interval, of: {name: slg, layers: [7, 8, 9]}, low: 0.01, high: 0.2, by: progress}``.

    Args:
        layers: blocks by name (``blocks.7``, ``middle.attention``, patterns such as ``up.*``) or place among
            them; see ``imagen_kit.guidance.layers`` for blocks of one's own.
        scale: guidance scale, any finite number; 0 is no guidance.
        cond: conditioning of the prediction without the blocks.

    Raises:
        KitError: a scale that is not a number, no layers; with its network, a block that it lacks.
    """

    scale: float = 2.5
    who = "slg"
    kind = "block"
