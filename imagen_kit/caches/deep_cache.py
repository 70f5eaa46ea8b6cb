"""DeepCache (Ma, Fang & Wang 2023): a U-Net's deep features used again at the steps between."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from imagen_kit.caches import register
from imagen_kit.caches.base import Fixed, Turn, whole
from imagen_kit.errors import KitError
from imagen_kit.guidance.base import number


@register("deep_cache", waits=0, capturable=True)
@dataclass(frozen=True)
class DeepCache(Fixed):
    """Compute a U-Net at one step in n; between them only what lies outside its outermost skip connections.

    The steps computed are 0, n, 2n, … (the paper's uniform 1:N), or with a ``center`` as many that crowd about it
    (its non-uniform schedule, §3.3): step c + sign(u)·|u|^p with u spaced evenly from −c^(1/p) to (T − c)^(1/p) over
    T steps. Features are said to change most there, early in the run.

    Args:
        every: n; 1 computes always.
        center: where in the run, from 0 (the start) to 1, steps are computed most densely; None = evenly.
        power: p of the spacing, at least 1; 1 = evenly.
        depth: skip connections outside, computed at every evaluation: 1 is the first convolution and the last
            block. (Of a transformer: blocks at the start.)

    Raises:
        KitError: numbers out of range; in a run, a ``center`` where the grid of the run is not known.
    """

    every: int = 3
    center: float | None = None
    power: float = 1.4

    def __post_init__(self) -> None:
        super().__post_init__()
        whole(self, "every", least=1)
        if self.center is not None:
            number(self.center, "cache center", 0.0, 1.0)
        number(self.power, "cache power", 1.0)

    def full(self, turn: Turn) -> bool:
        if self.center is None:
            return turn.number % self.every == 0
        if turn.steps is None:
            raise KitError(
                "cache deep_cache with a center needs the grid of the run: begin(network, times=[...])"
            )
        here = turn.number if turn.place is None else int(turn.place + 1e-9)
        before = -1 if turn.before is None else int(turn.before + 1e-9)
        # a solver's further evaluations in a step are near its first
        return here != before and here in crowded(turn.steps, self.every, self.center, self.power)


@lru_cache(maxsize=64)
def crowded(steps: int, every: int, center: float, power: float) -> frozenset[int]:
    """Which of ``steps`` steps are computed: one in ``every`` of them (rounded up), 0 first, crowding about a place.

    Where they would fall on one step they take the next ones, so that their number, the cost, stays as it is.
    """
    count, middle = -(-steps // every), center * steps
    low, high = -(middle ** (1 / power)), (steps - middle) ** (1 / power)
    chosen: list[int] = []
    for i in range(count):
        u = low + (high - low) * i / count
        place = middle + (abs(u) ** power if u > 0 else -(abs(u) ** power))
        least = chosen[-1] + 1 if chosen else 0
        chosen.append(min(max(int(place + 1e-9), least), steps - count + i))
    return frozenset(chosen)
