"""timm's image models as encoders: feature maps of several sizes, free of batch statistics.

Axes: b batch, c channels, h w picture.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from imagen_kit.denoisers.layers.blocks import group_norm
from imagen_kit.errors import KitError, nearest

#: What frees timm's transformers of one picture size: ViT and its kin, Swin and its kin, all others.
ANY_SIZE: tuple[dict[str, Any], ...] = ({"dynamic_img_size": True}, {"strict_img_size": False}, {})


@dataclass(frozen=True)
class Backbone:
    """Which of timm's models, and how it is made.

    Attributes:
        name: as ``timm.list_models()`` gives it.
        indices: which of its feature maps are used, from fine to coarse; None for all. Leaving out the coarsest
            ones allows smaller pictures.
        options: further arguments of the model, e.g. ``{"drop_path_rate": 0.1}``.
    """

    name: str = "convnext_tiny"
    indices: tuple[int, ...] | list[int] | None = None
    options: Mapping[str, Any] = field(default_factory=dict)


class Features(nn.Module):
    """A timm model that answers with its feature maps.

    Batch normalisation is replaced by group normalisation with the same affine weights: a batch mixes noise
    levels, and no picture may depend on the others.

    Args:
        backbone: the model.
        in_channels: of the picture.
        pretrained: file of timm weights (safetensors or a plain ``.pth``), None for random weights. Its first
            convolution is adapted to ``in_channels`` as timm does.

    Attributes:
        channels, reductions: of each map, and the picture's side over its side.

    Raises:
        KitError: timm does not know the model, or cannot give its feature maps; a file that does not hold its
            weights.
    """

    def __init__(self, backbone: Backbone, in_channels: int, pretrained: str | Path | None = None):
        super().__init__()
        overlay: dict[str, Any] = {}
        if pretrained is not None:
            _check_weights(backbone, Path(pretrained))
            overlay = {"pretrained": True, "pretrained_cfg_overlay": {"file": str(pretrained)}}
        indices = {} if backbone.indices is None else {"out_indices": tuple(backbone.indices)}
        self.model = _create(backbone, features_only=True, in_chans=in_channels, **indices, **overlay)
        _without_batch_statistics(self.model, backbone.name)
        info: Any = self.model.feature_info
        self.channels: list[int] = list(info.channels())
        self.reductions: list[int] = list(info.reduction())
        if sorted(self.reductions) != self.reductions:
            raise KitError(f"timm model {backbone.name!r}: its feature maps do not go from fine to coarse")
        self.name, self.last = backbone.name, str(getattr(self.model, "output_fmt", "NCHW")).endswith("NHWC")

    def forward(self, x: Tensor) -> list[Tensor]:
        """(b, c, h, w) → maps (b, channels[i], h / reductions[i], w / reductions[i])."""
        maps = self.model(x) if torch.compiler.is_compiling() else self._run(x)
        return [y.permute(0, 3, 1, 2) for y in maps] if self.last else list(maps)

    def _run(self, x: Tensor) -> list[Tensor]:
        try:
            return self.model(x)
        except torch.OutOfMemoryError:
            raise
        except (AssertionError, RuntimeError) as error:
            reason = (str(error).strip().splitlines() or ["unsupported"])[0]
            raise KitError(
                f"timm model {self.name!r} cannot take pictures of {x.shape[-2]}×{x.shape[-1]}: {reason}"
            ) from error


def _create(backbone: Backbone, **options: Any) -> nn.Module:
    """The timm model, free to take pictures of any size where it can be."""
    import timm

    name = backbone.name
    if not timm.is_model(name):
        guess = nearest(name, timm.list_models())
        hint = f"did you mean {guess!r}?" if guess else "see timm.list_models()"
        raise KitError(f"timm has no model {name!r}; {hint}")
    given = {**backbone.options, **options}
    faults: list[Exception] = []
    for free in ANY_SIZE:
        if free.keys() & given.keys():
            continue
        try:
            return timm.create_model(name, **free, **given)
        except TypeError as error:  # the model has no such argument
            faults.append(error)
        except (RuntimeError, ValueError, AttributeError, AssertionError, KeyError, IndexError) as error:
            faults.append(error)
            break
    reason = str(faults[-1]).strip().splitlines()[0] if faults and str(faults[-1]).strip() else "unsupported"
    raise KitError(f"timm model {name!r} cannot be made an encoder: {reason}")


def _check_weights(backbone: Backbone, path: Path) -> None:
    """KitError unless the file holds every weight of the model in its shape; its classifier does not count.

    timm itself skips what does not fit when only features are asked for, and would train from noise.
    """
    from timm.models import load_state_dict

    if not path.is_file():
        raise KitError(f"timm weights {path}: no such file")
    try:
        found = load_state_dict(str(path), device="cpu", weights_only=True)
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise KitError(f"timm weights {path}: cannot be read ({reason})") from error
    with torch.device("meta"):
        model = _create(backbone)
    classifier = getattr(model, "default_cfg", {}).get("classifier") or ()
    heads = (classifier,) if isinstance(classifier, str) else tuple(classifier)
    faults = []
    for key, value in model.state_dict().items():
        if any(key.startswith(f"{head}.") for head in heads):
            continue
        if key not in found:
            faults.append(f"missing {key}")
        elif found[key].shape != value.shape:
            faults.append(f"{key} is {tuple(found[key].shape)}, not {tuple(value.shape)}")
    if faults:
        more = f" and {len(faults) - 3} more" if len(faults) > 3 else ""
        raise KitError(f"timm weights {path} do not fit {backbone.name!r}: {'; '.join(faults[:3])}{more}")


def _without_batch_statistics(model: nn.Module, name: str) -> None:
    """Replace every BatchNorm by a GroupNorm with its affine weights, in place."""
    for parent in list(model.modules()):
        for key, child in list(parent.named_children()):
            if not isinstance(child, nn.modules.batchnorm._BatchNorm):
                continue
            if not isinstance(child, nn.BatchNorm2d):
                raise KitError(
                    f"timm model {name!r} normalises tokens over the batch, which mixes noise levels; "
                    "choose another, e.g. 'convnext_tiny'"
                )
            setattr(parent, key, _group_norm_of(child))


def _group_norm_of(norm: nn.BatchNorm2d) -> nn.Module:
    own = group_norm(norm.num_features)
    own.eps = norm.eps
    if norm.affine:
        with torch.no_grad():
            own.weight.copy_(norm.weight)
            own.bias.copy_(norm.bias)
    after = [
        layer for layer in (getattr(norm, "drop", None), getattr(norm, "act", None)) if layer is not None
    ]
    return nn.Sequential(own, *after) if after else own
