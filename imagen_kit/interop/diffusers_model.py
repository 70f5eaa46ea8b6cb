"""Models of diffusers as denoisers: which of a ``Cond``'s parts each is told, and under which name.

Axes: b batch, c h w latents, n text tokens.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from imagen_kit.conditioning import Cond
from imagen_kit.errors import KitError

#: Flow models that are told 1000 t; all others are told our native time.
THOUSAND = ("SD3Transformer2DModel", "SanaTransformer2DModel")


class DiffusersDenoiser(nn.Module):
    """See ``interop.diffusers.denoiser``.

    Args:
        model: a model, or a pipeline with a ``unet`` or a ``transformer``.
        time_scale: factor on t; None = the model's convention.
        embedded_guidance: for models whose config has ``guidance_embeds``.
    """

    def __init__(self, model: Any, time_scale: float | None = None, embedded_guidance: float = 3.5):
        super().__init__()
        if not isinstance(model, nn.Module):
            model = getattr(model, "unet", None) or getattr(model, "transformer", None)
        if not isinstance(model, nn.Module):
            raise KitError("expected a diffusers model, or a pipeline that has a unet or a transformer")
        self.model = model
        names = list(inspect.signature(model.forward).parameters)
        if "timestep" not in names or names[0] not in ("sample", "hidden_states"):
            raise KitError(f"{type(model).__name__} is not a denoiser: it takes {', '.join(names[:3])}, ...")
        self.accepted = frozenset(names)
        self.picture = names[0]
        known = type(model).__name__ in THOUSAND
        self.time_scale = (1000.0 if known else 1.0) if time_scale is None else float(time_scale)
        self.embedded_guidance = float(embedded_guidance)
        self.packs = "img_ids" in names

    @property
    def dtype(self) -> torch.dtype:
        """What the model computes in."""
        return next((p.dtype for p in self.model.parameters() if p.is_floating_point()), torch.float32)

    def forward(self, x: Tensor, t: Tensor, cond: Cond | None = None) -> Tensor:
        """The model's raw answer.

        Args:
            x: (b, c, h, w).
            t: (b,) native times.
            cond: what the model is told besides; parts it has no argument for are an error.

        Returns:
            (b, c, h, w) in x's dtype, or with more channels where the model has them.

        Raises:
            KitError: a part of ``cond`` that the model does not take.
        """
        cond = (cond or Cond()).to(dtype=self.dtype)
        arguments = self._arguments(cond)
        picture = x if cond.low_res is None else torch.cat([x, cond.low_res.to(x.dtype)], 1)
        h, w = x.shape[-2:]
        picture = picture.to(self.dtype)
        if self.packs:
            arguments |= self._positions(len(x), h, w, cond, x.device)
            picture = pack(picture)
        arguments[self.picture] = picture
        answer = self.model(timestep=t * self.time_scale, return_dict=False, **arguments)[0]
        return (unpack(answer, h, w) if self.packs else answer).to(x.dtype)

    def _arguments(self, cond: Cond) -> dict[str, Any]:
        """Keyword arguments for the parts of ``cond``, but for the picture beside x."""
        found: dict[str, Any] = {}
        level = None if cond.low_res_level is None else cond.low_res_level * 1000
        added = self._added(cond)
        parts = {
            "encoder_hidden_states": ("tokens", cond.tokens),
            "encoder_attention_mask": ("mask", None if self._ignores_mask else cond.mask),
            "class_labels": ("labels or low_res_level", cond.labels if level is None else level),
            "pooled_projections": ("pooled", None if "text_embeds" in added else cond.pooled),
        }
        for argument, (part, value) in parts.items():
            if value is None:
                continue
            if argument not in self.accepted:
                raise KitError(f"{type(self.model).__name__} takes no {argument} (cond.{part})")
            found[argument] = value
        if added:
            found["added_cond_kwargs"] = added
        return found

    @property
    def _ignores_mask(self) -> bool:
        """Joint-attention transformers attend to all tokens, as they were trained to."""
        return "pooled_projections" in self.accepted

    def _added(self, cond: Cond) -> dict[str, Any]:
        """SDXL's pooled text and sizes; PixArt's resolution and aspect ratio."""
        if "added_cond_kwargs" not in self.accepted:
            return {}
        config: Any = self.model.config
        if getattr(config, "addition_embed_type", None) == "text_time":
            if cond.pooled is None or cond.size is None:
                raise KitError(f"{type(self.model).__name__} needs cond.pooled and cond.size (six numbers)")
            return {"text_embeds": cond.pooled, "time_ids": cond.size}
        if "use_additional_conditions" not in config:
            return {}
        if not self.model.use_additional_conditions:
            return {"resolution": None, "aspect_ratio": None}
        if cond.size is None or cond.size.shape[1] != 3:
            raise KitError(f"{type(self.model).__name__} needs cond.size: height, width and their ratio")
        return {"resolution": cond.size[:, :2], "aspect_ratio": cond.size[:, 2:]}

    def _positions(self, b: int, h: int, w: int, cond: Cond, device: torch.device) -> dict[str, Any]:
        """FLUX's row and column numbers of patches and (zero) of tokens, and the embedded guidance."""
        if cond.tokens is None or cond.pooled is None:
            raise KitError(f"{type(self.model).__name__} needs cond.tokens and cond.pooled")
        rows, columns = torch.meshgrid(
            torch.arange(h // 2, device=device), torch.arange(w // 2, device=device), indexing="ij"
        )
        image = torch.stack([torch.zeros_like(rows), rows, columns], -1).flatten(0, 1).to(self.dtype)
        text = torch.zeros(cond.tokens.shape[1], 3, device=device, dtype=self.dtype)
        found = {"img_ids": image, "txt_ids": text}
        if getattr(self.model.config, "guidance_embeds", False):
            found["guidance"] = torch.full((b,), self.embedded_guidance, device=device)
        return found


def pack(x: Tensor) -> Tensor:
    """(b, c, h, w) -> (b, h/2 · w/2, 4c): patches of 2 × 2, channel slowest, as FLUX reads them."""
    b, c, h, w = x.shape
    if h % 2 or w % 2:
        raise KitError(f"this model reads patches of 2 × 2; sides {h}×{w} must be even")
    return x.reshape(b, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(b, h * w // 4, 4 * c)


def unpack(tokens: Tensor, h: int, w: int) -> Tensor:
    """Inverse of ``pack``."""
    b, _, width = tokens.shape
    patches = tokens.reshape(b, h // 2, w // 2, width // 4, 2, 2)
    return patches.permute(0, 3, 1, 4, 2, 5).reshape(b, width // 4, h, w)
