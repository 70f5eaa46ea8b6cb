"""The pocket world as a training set: endless pictures of a pool of scenes, captioned in two languages."""

from __future__ import annotations

import torch

from imagen_kit.data import register
from imagen_kit.data.base import Examples
from imagen_kit.data.pocket.renderer import render
from imagen_kit.data.pocket.scenes import SceneBatch, caption, sample_batch
from imagen_kit.errors import KitError


@register("pocket")
class PocketDataset:
    """Rendered scenes with English and Chinese captions; held-out combinations never appear.

    Args:
        pool: number of distinct scenes; positions and sizes are drawn anew every time. A finite pool lets the
            frozen text encoder's features be kept in memory.
        pair_fraction: share of scenes with two objects.
        languages: caption languages, equally likely.
        seed: of the pool.
    """

    def __init__(
        self,
        pool: int = 30_000,
        pair_fraction: float = 0.75,
        languages: tuple[str, ...] | list[str] = ("en", "zh"),
        seed: int = 0,
    ):
        if pool < 1:
            raise KitError(f"pocket pool must be at least 1 scene, not {pool}")
        if not languages or set(languages) - {"en", "zh"}:
            raise KitError(f"pocket languages {list(languages)!r}: choose from en, zh")
        self.languages = tuple(languages)
        self.pair_fraction = pair_fraction
        self.pool = sample_batch(pool, torch.Generator().manual_seed(seed), "train", pair_fraction)

    def batch(self, n: int, size: int, generator: torch.Generator, low_size: int | None = None) -> Examples:
        """n pictures of pool scenes; see ``Dataset``."""
        scenes = self.pool[torch.randint(len(self.pool), (n,), generator=generator)]
        return self._render(scenes, size, generator, low_size)

    def examples(self, n: int, size: int, low_size: int | None = None) -> Examples:
        """n pictures of held-out scenes."""
        generator = torch.Generator().manual_seed(1)
        return self._render(
            sample_batch(n, generator, "held_out", self.pair_fraction), size, generator, low_size
        )

    def _render(
        self, scenes: SceneBatch, size: int, generator: torch.Generator, low_size: int | None
    ) -> Examples:
        picks = torch.randint(len(self.languages), (len(scenes),), generator=generator).tolist()
        captions = [caption(s, self.languages[k]) for s, k in zip(scenes.scenes(), picks, strict=True)]  # type: ignore[arg-type]
        layout = int(torch.randint(2**62, (), generator=generator))
        sides = (size,) if low_size is None else (size, low_size)
        drawn = [render(scenes, side, torch.Generator().manual_seed(layout)) for side in sides]
        return Examples(drawn[0], captions, drawn[1] if low_size is not None else None)
