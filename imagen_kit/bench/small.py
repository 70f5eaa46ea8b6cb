"""Published recipes in small: the same parts, schedules, samplers and guidance, narrower networks, smaller pictures.

``tiny`` is for tests, ``small`` for machines without an accelerator. Text widths are those of tiny encoders.
"""

from __future__ import annotations

from imagen_kit.errors import KitError, unknown

FULL, SMALL, TINY = "full", "small", "tiny"
SIZES = (FULL, SMALL, TINY)


def overrides(recipe: str, size: str) -> list[str]:
    """What to change in a shipped recipe, as ``--set`` would.

    Args:
        recipe: its name.
        size: full (nothing), small or tiny.

    Raises:
        KitError: an unknown size, or a recipe that there is no small variant of.
    """
    if size not in SIZES:
        raise KitError(unknown("size of a recipe", size, SIZES))
    if size == FULL:
        return []
    if recipe not in CHANGES:
        raise KitError(
            f"recipe {recipe!r} has no {size} variant; there is one of {', '.join(CHANGES)}; "
            "give its own sizes with set"
        )
    tiny, small = CHANGES[recipe]
    return tiny if size == TINY else small


def _codec(widths: list[int], channels: int = 4, **more: object) -> str:
    told = "".join(f", {key}: {str(value).lower()}" for key, value in more.items())
    return f"stages.0.codec={{name: kl, widths: {widths}, blocks: 1, channels: {channels}{told}}}"


def _text(*paths: str) -> list[str]:
    return [f"{path}.{key}" for path in paths for key in ("weights=random", "size=tiny")]


def _told(side: int) -> str:
    return f"stages.0.told.size=[{side}, {side}, 1]"


def _transformer(name: str, numbers: str) -> str:
    return f"stages.0.denoiser={{name: {name}, {numbers}}}"


def _latent_unet(widths: list[int], head: int, more: str = "") -> str:
    """Stable Diffusion's blocks; the finest level attends in 1.x alone, but here in both."""
    kind = f"{{kind: transformer, head_dim: {head}}}"
    levels = ", ".join(f"{{channels: {width}, blocks: 1, attention: {kind}}}" for width in widths)
    style = "{modulation: shift, resample: conv, groups: 32}"
    return f"stages.0.denoiser={{name: adm, style: {style}, levels: [{levels}]{more}}}"


def _if_unet(stage: int, widths: list[int], head: int, second: bool = False) -> str:
    cells = ", cells: false" if second else ""
    attended = f"attention: {{head_dim: {head}{cells}}}"
    scale = ", skip_scale: 0.7071" if second else ""
    fine, *coarse = widths
    levels = [f"{{channels: {fine}, blocks: 1}}"]
    levels += [f"{{channels: {width}, blocks: 1, {attended}}}" for width in coarse]
    return (
        f"stages.{stage}.denoiser={{name: adm, out_channels: 6, "
        f"style: {{activation: gelu, resample: residual, groups: 32{scale}}}, "
        f"levels: [{', '.join(levels)}], embedding: {{text_width: {widths[-1]}, text_heads: 4}}}}"
    )


def _latent(denoiser: str, codec: str, size: int, steps: int, *more: str) -> list[str]:
    return [denoiser, codec, f"stages.0.size={size}", f"stages.0.sampler.steps={steps}", *more]


_NARROW, _WIDE = [32, 32, 32, 32], [32, 64, 64, 64]
_SD3 = _text(*(f"text_encoder.encoders.0.encoders.{i}" for i in (0, 1)), "text_encoder.encoders.1")
_TWO = _text("text_encoder.encoders.0", "text_encoder.encoders.1")
_MICRO = ", embedding: {size_numbers: 6, size_width: 32}"


def _dit(width: int, depth: int, heads: int, codec: list[int], size: int, steps: int) -> list[str]:
    numbers = f"learn_sigma: true, width: {width}, depth: {depth}, heads: {heads}"
    return _latent(_transformer("dit", numbers), _codec(codec), size, steps)


def _pixart(width: int, depth: int, heads: int, codec: list[int], size: int, steps: int) -> list[str]:
    numbers = (
        f"learn_sigma: true, width: {width}, depth: {depth}, heads: {heads}, sizes: true, "
        "details: {grid: 64, interpolation: 2.0}"
    )
    found = _latent(_transformer("pixart", numbers), _codec(codec), size, steps, _told(size))
    return [*_text("text_encoder"), *found]


def _sd3(width: int, depth: int, heads: int, codec: list[int], size: int, steps: int) -> list[str]:
    network = _transformer("mmdit", f"width: {width}, depth: {depth}, heads: {heads}, details: {{grid: 32}}")
    latents = _codec(codec, 16, scale=1.5305, shift=0.0609, quant=False)
    return [*_SD3, *_latent(network, latents, size, steps)]


def _flux(width: int, depth: int, heads: int, codec: list[int], size: int, steps: int) -> list[str]:
    numbers = f"width: {width}, depth: {depth}, single_depth: {2 * depth}, heads: {heads}, guidance: true"
    latents = _codec(codec, 16, scale=0.3611, shift=0.1159, quant=False)
    return [*_TWO, *_latent(_transformer("flux", numbers), latents, size, steps)]


def _deepfloyd(widths: tuple[list[int], list[int]], head: int, sizes: tuple[int, int]) -> list[str]:
    found = _text("text_encoder")
    for stage, (own, size) in enumerate(zip(widths, sizes, strict=True)):
        found += [_if_unet(stage, own, head, second=bool(stage)), f"stages.{stage}.weights=random"]
        found.append(f"stages.{stage}.size={size}")
    return found


#: Shipped recipe → what makes it tiny, what makes it small.
CHANGES: dict[str, tuple[list[str], list[str]]] = {
    "dit-xl-2-256": (_dit(32, 2, 2, _NARROW, 64, 4), _dit(384, 6, 6, _WIDE, 256, 20)),
    "sd15": (
        [*_text("text_encoder"), *_latent(_latent_unet([32, 32], 16), _codec(_NARROW), 64, 4)],
        [*_text("text_encoder"), *_latent(_latent_unet([64, 128, 256], 32), _codec(_WIDE), 256, 20)],
    ),
    "sdxl": (
        [*_TWO, *_latent(_latent_unet([32, 32], 16, _MICRO), _codec(_NARROW, scale=0.13025), 64, 4)],
        [*_TWO, *_latent(_latent_unet([64, 128, 256], 32, _MICRO), _codec(_WIDE, scale=0.13025), 256, 20)],
    ),
    "pixart-alpha": (_pixart(48, 2, 2, _NARROW, 64, 4), _pixart(288, 6, 6, _WIDE, 256, 20)),
    "sd3-medium": (_sd3(32, 2, 2, _NARROW, 64, 4), _sd3(256, 6, 4, _WIDE, 256, 20)),
    "flux-dev": (_flux(32, 1, 2, _NARROW, 64, 4), _flux(256, 3, 4, _WIDE, 256, 20)),
    "deepfloyd-if": (
        _deepfloyd(([32, 32], [32, 32]), 16, (16, 32)),
        _deepfloyd(([64, 128, 192], [64, 128, 192]), 32, (64, 128)),
    ),
}
