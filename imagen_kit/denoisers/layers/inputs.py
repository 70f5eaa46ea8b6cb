"""What a denoiser may be called with, checked once for all architectures.

Axes: b batch, c channels, h w picture, n tokens, d width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from imagen_kit.conditioning import Cond
from imagen_kit.errors import KitError


@dataclass(frozen=True)
class Inputs:
    """The inputs a network was built for.

    Attributes:
        kind: its registered name, for messages.
        in_channels: of x.
        multiple: that sides must be divisible by.
        context_dim, pooled_dim, num_classes: as in the constructor; None for a part it does without.
        low_res_channels: of the low-resolution picture; 0 for none.
        low_res_noised: whether the network is told the low-resolution picture's noise level.
        size_numbers: how many size and crop numbers it is told; 0 for none.
    """

    kind: str
    in_channels: int
    multiple: int
    context_dim: int | None = None
    pooled_dim: int | None = None
    num_classes: int | None = None
    low_res_channels: int = 0
    low_res_noised: bool = True
    size_numbers: int = 0

    def check(self, x: Tensor, t: Tensor, cond: Cond) -> None:
        """KitError in one line, naming the first input that does not fit. Looks at shapes alone."""
        kind = self.kind
        if x.ndim != 4 or x.shape[1] != self.in_channels:
            raise KitError(
                f"picture of shape {tuple(x.shape)}: this {kind} takes (b, {self.in_channels}, h, w)"
            )
        h, w = x.shape[-2:]
        if h % self.multiple or w % self.multiple:
            raise KitError(f"picture of {h}×{w}: sides must be multiples of {self.multiple}")
        if t.shape != x.shape[:1]:
            raise KitError(f"times of shape {tuple(t.shape)}: give one for each of the {len(x)} pictures")
        if self.num_classes is not None and cond.labels is None:
            raise KitError(f"this {kind} was built with num_classes: give it labels in cond")
        self.check_text(cond)
        if self.low_res_channels:
            if cond.low_res is None or (self.low_res_noised and cond.low_res_level is None):
                needed = "low_res and low_res_level" if self.low_res_noised else "low_res"
                raise KitError(f"this {kind} is a super-resolution stage: give it {needed} in cond")
            if cond.low_res.shape[1:] != (self.low_res_channels, h, w):
                raise KitError(
                    f"low_res of shape {tuple(cond.low_res.shape)}: "
                    f"this {kind} needs (b, {self.low_res_channels}, {h}, {w}), resized to x"
                )
        if self.size_numbers and cond.size is None:
            raise KitError(
                f"this {kind} is told sizes: give it (b, {self.size_numbers}) numbers in cond.size"
            )

    def check_text(self, cond: Cond) -> None:
        """KitError in one line where the text does not fit."""
        kind = self.kind
        if self.context_dim is not None:
            if cond.tokens is None:
                raise KitError(f"this {kind} was built with context_dim: give it text tokens in cond")
            if cond.tokens.shape[-1] != self.context_dim:
                raise KitError(
                    f"text tokens of width {cond.tokens.shape[-1]}: "
                    f"this {kind} was built with context_dim {self.context_dim}"
                )
            if self.pooled_dim is not None and cond.pooled is None:
                raise KitError(f"this {kind} was built with pooled_dim: give it the pooled text in cond")

    def picture(self, x: Tensor, cond: Cond) -> Tensor:
        """x joined with the low-resolution picture, (b, in + low_res, h, w)."""
        if not self.low_res_channels or cond.low_res is None:
            return x
        return torch.cat([x, cond.low_res.to(x.dtype)], dim=1)
