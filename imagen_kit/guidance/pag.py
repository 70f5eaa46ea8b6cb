"""Perturbed-attention guidance (Ahn et al. 2024)."""

from __future__ import annotations

from dataclasses import dataclass

from imagen_kit.guidance import register
from imagen_kit.guidance.layers import LayerGuidance


@register("pag", extra_evaluations="1 (perturbed); none at scale 0", works_in="raw")
@dataclass(frozen=True)
class PAG(LayerGuidance):
    """cond + scale·(cond − perturbed); perturbed: some self-attention maps are the identity (Ahn et al. 2024).

    It needs neither text nor training without text, and adds up with CFG. The network must compute its
    attention by ``imagen_kit.attention``; see ``imagen_kit.guidance.layers`` for layers of one's own.

    Args:
        layers: self-attention layers by name (``middle``, ``blocks.7``, patterns such as ``up.0.*``) or place
            among them; the paper takes the middle of a U-Net.
        scale: guidance scale, any finite number; 0 is no guidance.
        cond: conditioning of the perturbed prediction.

    Raises:
        KitError: a scale that is not a number, no layers; with its network, a layer that it lacks.
    """

    scale: float = 3.0
    who = "pag"
    kind = "attention"
