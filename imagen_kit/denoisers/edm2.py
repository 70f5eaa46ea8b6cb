"""EDM2's magnitude-preserving U-Net (Karras et al. 2024, configuration G), and its published sizes.

No normalisation layers and no biases: weights, sums, concatenations and nonlinearities keep the variance of what
goes through them instead, and attention is on unit queries, keys and values.

The network answers F of Karras et al. 2022, eq. 7: with the prediction ``edm`` it is given c_in·x and ln(sigma)/4.

Axes: b batch, c channels, h w picture, a heads, d head width, e embedding width.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from imagen_kit.attention import attention
from imagen_kit.conditioning import Cond
from imagen_kit.denoisers import register
from imagen_kit.denoisers.layers.inner import inner, place
from imagen_kit.denoisers.layers.inputs import Inputs
from imagen_kit.denoisers.layers.magnitude import MPConv, MPFourier, mp_cat, mp_silu, mp_sum, unit
from imagen_kit.denoisers.layers.pictures import grown
from imagen_kit.denoisers.layers.skeleton import Level, Skeleton
from imagen_kit.errors import KitError

RESIDUAL = ATTENTION = 0.3  # share of a branch in the sum with its shortcut
LABEL = CONCAT = 0.5
CLIP = 256.0  # bound on activations, for float16
Runtime = Mapping[str, bool] | None
Named = list[tuple[str, nn.Module]]


class MPBlock(nn.Module):
    """A residual block of the encoder or decoder, at attention levels followed by self-attention (figure 21).

    Args:
        channels, out_channels: widths before and after.
        embed_dim: width of the embedding.
        decoder: projects the shortcut after the residual branch rather than before it, and does without the
            encoder's pixel norm.
        resample: ``down`` averages 2×2 cells first, ``up`` repeats them.
        head_dim: width of an attention head; 0 for no attention.
        dropout: before the second convolution.
    """

    def __init__(
        self,
        channels: int,
        out_channels: int,
        embed_dim: int,
        decoder: bool = False,
        resample: str | None = None,
        head_dim: int = 0,
        dropout: float = 0.0,
    ):
        super().__init__()
        self.decoder, self.resample, self.head_dim = decoder, resample, head_dim
        self.is_self_attention = bool(head_dim)  # these marks are read by guidance that changes layers
        # leaving such a block out keeps the magnitude, as the sum with its branch does
        self.is_residual = channels == out_channels and resample is None
        self.emb_gain = nn.Parameter(torch.zeros([]))
        self.conv_res0 = MPConv(channels if decoder else out_channels, out_channels, 3)
        self.emb_linear = MPConv(embed_dim, out_channels)
        self.dropout = nn.Dropout(dropout)
        self.conv_res1 = MPConv(out_channels, out_channels, 3)
        self.conv_skip = MPConv(channels, out_channels, 1) if channels != out_channels else None
        self.attn_qkv = MPConv(out_channels, 3 * out_channels, 1) if head_dim else None
        self.attn_proj = MPConv(out_channels, out_channels, 1) if head_dim else None

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        """(b, c, h, w), activated embedding (b, e) → (b, out, h', w')."""
        if self.resample == "down":
            x = F.avg_pool2d(x, 2)
        elif self.resample == "up":
            x = grown(x)
        if not self.decoder:
            x = unit(x if self.conv_skip is None else self.conv_skip(x), [1])
        y = self.conv_res0(mp_silu(x))
        scale = self.emb_linear(emb, self.emb_gain) + 1
        y = self.conv_res1(self.dropout(mp_silu(y * scale[:, :, None, None].to(y.dtype))))
        if self.decoder and self.conv_skip is not None:
            x = self.conv_skip(x)
        x = mp_sum(x, y, RESIDUAL)
        if self.attn_qkv is not None and self.attn_proj is not None:
            x = mp_sum(x, self.attn_proj(self._attend(self.attn_qkv(x))), ATTENTION)
        return x.clamp(-CLIP, CLIP)

    def _attend(self, qkv: Tensor) -> Tensor:
        """(b, a·d·3, h, w), of each head d triples (q, k, v) → (b, a·d, h, w)."""
        h, w = qkv.shape[-2:]
        heads = unit(qkv.flatten(2).unflatten(1, (-1, self.head_dim, 3)), [2])  # b a d 3 n
        q, k, v = heads.permute(3, 0, 1, 4, 2).unbind(0)
        return attention(q, k, v).transpose(2, 3).flatten(1, 2).unflatten(2, (h, w))


@register("edm2")
class EDM2(Skeleton):
    """EDM2's magnitude-preserving U-Net: class labels or none, latents or pixels.

    While training, weights are brought back to unit variance before each evaluation (forced weight normalisation);
    learning rates are then those of directions, about a hundred times the customary ones (0.012 … 0.0065).

    Args:
        in_channels: channels of x.
        out_channels: channels of the answer; ``in_channels`` by default.
        levels: resolutions from fine to coarse, each a ``Level`` or a mapping of its fields; attention is True or
            False, and the coarsest level starts the decoder with an attention block of its own in any case.
        head_dim: width of an attention head.
        num_classes: class labels 0 … num_classes - 1, ``num_classes`` meaning none; None without labels.
        logvar_channels: frequencies of ``logvar``, the learned uncertainty of the training loss; 0 for none.
        time_scale: factor on the time told, ln(sigma)/4.
        runtime: ``{"checkpointing": bool, "channels_last": bool}``: recompute activations in the backward
            pass; run convolutions in channels-last memory.

    Raises:
        KitError: widths that heads do not divide, an unknown field or option; when called, a missing or
            misshapen input.
    """

    def __init__(
        self,
        in_channels: int = 4,
        out_channels: int | None = None,
        levels: Sequence[Level | Mapping[str, Any]] = (
            {"channels": 128, "blocks": 3},
            {"channels": 256, "blocks": 3, "attention": True},
        ),
        head_dim: int = 64,
        num_classes: int | None = None,
        logvar_channels: int = 0,
        time_scale: float = 1.0,
        runtime: Runtime = None,
    ):
        super().__init__(runtime)
        stages = [Level.of(level) for level in levels]
        self._check(stages, head_dim)
        self.out_channels = out_channels or in_channels
        self.inputs = Inputs("edm2", in_channels, 2 ** (len(stages) - 1), num_classes=num_classes)
        self.num_classes, self.head_dim, self.time_scale = num_classes, head_dim, time_scale
        width = stages[0].channels
        self.embed_dim = max(level.channels for level in stages)
        self.emb_fourier = MPFourier(width)
        self.emb_noise = MPConv(width, self.embed_dim)
        self.emb_label = None if num_classes is None else MPConv(num_classes, self.embed_dim)
        self.logvar_fourier = MPFourier(logvar_channels) if logvar_channels else None
        self.logvar_linear = MPConv(logvar_channels, 1) if logvar_channels else None
        self._make(in_channels, stages)
        self.out_conv = MPConv(width, self.out_channels, 3)
        self.out_gain = nn.Parameter(torch.zeros([]))
        if self.channels_last:
            self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    @staticmethod
    def _check(stages: Sequence[Level], head_dim: int) -> None:
        if not stages:
            raise KitError("edm2 levels: give at least one, e.g. [{channels: 128, blocks: 3}]")
        for i, level in enumerate(stages):
            if not isinstance(level.attention, bool) or level.resample is not None:
                raise KitError("edm2 level: attention is true or false, and resample is not to be given")
            if (level.attention or i == len(stages) - 1) and level.channels % head_dim:
                raise KitError(f"edm2 level of {level.channels} channels: head_dim {head_dim} must divide it")

    def _make(self, channels: int, stages: Sequence[Level]) -> None:
        """Keys ``enc|dec.{level}_{part}``: the official ones with the level in place of its side."""
        self.enc, self.dec = nn.ModuleDict(), nn.ModuleDict()
        width, last = stages[0].channels, len(stages) - 1
        self.enc["0_conv"] = MPConv(channels + 1, width, 3)
        skips = [width]
        for i, level in enumerate(stages):
            if i:
                self.enc[f"{i}_down"] = self._block(width, width, level, resample="down")
                skips.append(width)
            for j in range(level.blocks):
                self.enc[f"{i}_block{j}"] = self._block(width, level.channels, level, level.attention)
                width = level.channels
                skips.append(width)
        for i, level in reversed(list(enumerate(stages))):
            if i == last:
                self.dec[f"{i}_in0"] = self._block(width, width, level, True, decoder=True)
                self.dec[f"{i}_in1"] = self._block(width, width, level, decoder=True)
            else:
                self.dec[f"{i}_up"] = self._block(width, width, level, decoder=True, resample="up")
            for j in range(level.blocks + 1):
                given = width + skips.pop()
                self.dec[f"{i}_block{j}"] = self._block(
                    given, level.channels, level, level.attention, decoder=True
                )
                width = level.channels

    def _block(
        self, channels: int, out_channels: int, level: Level, attends: Any = False, **kind: Any
    ) -> MPBlock:
        head_dim = self.head_dim if attends else 0
        return MPBlock(
            channels, out_channels, self.embed_dim, head_dim=head_dim, dropout=level.dropout, **kind
        )

    def _embed(self, t: Tensor, cond: Cond) -> Tensor:
        """Activated embedding (b, e) of time and class; no class is the zero vector."""
        dtype = self.emb_noise.weight.dtype
        emb = self.emb_noise(self.emb_fourier(self.time_scale * t).to(dtype))
        if self.emb_label is not None and self.num_classes is not None and cond.labels is not None:
            classes = F.one_hot(cond.labels, self.num_classes + 1)[:, : self.num_classes].to(dtype)
            emb = mp_sum(emb, self.emb_label(classes * math.sqrt(self.num_classes)), LABEL)
        return mp_silu(emb)

    def forward(self, x: Tensor, t: Tensor, cond: Cond | None = None) -> Tensor:
        """The network's raw answer F.

        Args:
            x: (b, in_channels, h, w) noisy picture of unit variance (c_in·x); sides multiples of 2^(levels - 1).
            t: (b,) ln(sigma)/4.
            cond: labels where the network was built with ``num_classes``.

        Returns:
            (b, out_channels, h, w).
        """
        cond = cond or Cond()
        self.inputs.check(x, t, cond)
        if self.training:
            self.normalize_weights()
        emb = self._embed(t, cond)
        x = torch.cat([x, torch.ones_like(x[:, :1])], dim=1)  # in place of biases
        if self.channels_last:
            x = x.contiguous(memory_format=torch.channels_last)
        enc, dec = list(self.enc.items()), list(self.dec.items())
        cut = place(len(enc))
        turn = [i for i, (name, _) in enumerate(dec) if "block" in name][-cut]
        skips: list[Tensor] = []
        x = self._encode(enc[:cut], skips, x, emb)
        x = inner(partial(self._core, enc[cut:], dec[:turn]), x, (emb,))
        x = self._decode(dec[turn:], skips, x, emb)
        return self.out_conv(x, self.out_gain)

    def _core(self, enc: Named, dec: Named, x: Tensor, emb: Tensor) -> Tensor:
        """What the innermost of the outer skip connections (b, c, h, w) is joined with on the way up."""
        skips: list[Tensor] = []
        x = self._encode(enc, skips, x, emb)
        return self._decode(dec, skips, x, emb)

    def _encode(self, blocks: Named, skips: list[Tensor], x: Tensor, emb: Tensor) -> Tensor:
        for name, block in blocks:
            x = block(x) if name == "0_conv" else self._apply_block(block, x, emb)
            skips.append(x)
        return x

    def _decode(self, blocks: Named, skips: list[Tensor], x: Tensor, emb: Tensor) -> Tensor:
        for name, block in blocks:
            if "block" in name:
                x = mp_cat(x, skips.pop(), CONCAT)
            x = self._apply_block(block, x, emb)
        return x

    @property
    def shares(self) -> list[float]:
        """By place, the share of blocks that lies inside it; see ``layers.inner``."""
        total = len(self.enc) - 1 + len(self.dec)
        ups = [i for i, name in enumerate(self.dec) if "block" in name]
        return [(len(self.enc) - k + ups[-k]) / total for k in range(1, len(self.enc) + 1)]

    def normalize_weights(self) -> None:
        """Forced weight normalisation of every layer (section 2.3)."""
        for module in self.modules():
            if isinstance(module, MPConv):
                module.normalize()

    def logvar(self, t: Tensor) -> Tensor:
        """(b,) ln(sigma)/4 → (b,) log-variance u of the error, for the loss e^-u·error + u.

        Raises:
            KitError: the network was built with ``logvar_channels`` 0.
        """
        if self.logvar_fourier is None or self.logvar_linear is None:
            raise KitError("this edm2 has no logvar: build it with logvar_channels, e.g. 128")
        waves = self.logvar_fourier(self.time_scale * t).to(self.logvar_linear.weight.dtype)
        return self.logvar_linear(waves).squeeze(1)


def _sampling(guidance: float) -> dict[str, Any]:
    return {
        "sampling": {
            "schedule": {"name": "edm", "sigma_min": 0.002, "sigma_max": 80.0},
            "prediction": "edm",
            "sampler": "heun",
            "spacing": "karras",
            "steps": 32,
            "guidance": guidance,
        }
    }


def _size(width: int, dropout: float, told: tuple[int, int | None, float, Runtime]) -> EDM2:
    in_channels, num_classes, time_scale, runtime = told
    levels = [
        {"channels": width * (i + 1), "blocks": 3, "attention": i >= 2, "dropout": dropout} for i in range(4)
    ]
    return EDM2(*(in_channels, None, levels, 64, num_classes, 128), time_scale=time_scale, runtime=runtime)


@register("edm2_xs", **_sampling(1.4))
def edm2_xs(
    in_channels: int = 4, num_classes: int | None = 1000, time_scale: float = 1.0, runtime: Runtime = None
) -> EDM2:
    """EDM2-XS for ImageNet 512² (latents of 64²), 125 M parameters; unconditional, the guide of the others."""
    return _size(128, 0.0, (in_channels, num_classes, time_scale, runtime))


@register("edm2_s", **_sampling(1.4))
def edm2_s(
    in_channels: int = 4, num_classes: int | None = 1000, time_scale: float = 1.0, runtime: Runtime = None
) -> EDM2:
    """EDM2-S for ImageNet 512², or with 3 channels for ImageNet 64²: 280 M parameters."""
    return _size(192, 0.0, (in_channels, num_classes, time_scale, runtime))


@register("edm2_m", **_sampling(1.2))
def edm2_m(
    in_channels: int = 4, num_classes: int | None = 1000, time_scale: float = 1.0, runtime: Runtime = None
) -> EDM2:
    """EDM2-M for ImageNet 512², or with 3 channels for ImageNet 64²: 498 M parameters."""
    return _size(256, 0.1, (in_channels, num_classes, time_scale, runtime))


@register("edm2_l", **_sampling(1.2))
def edm2_l(
    in_channels: int = 4, num_classes: int | None = 1000, time_scale: float = 1.0, runtime: Runtime = None
) -> EDM2:
    """EDM2-L for ImageNet 512², or with 3 channels for ImageNet 64²: 777 M parameters."""
    return _size(320, 0.1, (in_channels, num_classes, time_scale, runtime))


@register("edm2_xl", **_sampling(1.2))
def edm2_xl(
    in_channels: int = 4, num_classes: int | None = 1000, time_scale: float = 1.0, runtime: Runtime = None
) -> EDM2:
    """EDM2-XL for ImageNet 512², or with 3 channels for ImageNet 64²: 1.12 B parameters."""
    return _size(384, 0.1, (in_channels, num_classes, time_scale, runtime))


@register("edm2_xxl", **_sampling(1.2))
def edm2_xxl(
    in_channels: int = 4, num_classes: int | None = 1000, time_scale: float = 1.0, runtime: Runtime = None
) -> EDM2:
    """EDM2-XXL for ImageNet 512²: 1.52 B parameters."""
    return _size(448, 0.1, (in_channels, num_classes, time_scale, runtime))
