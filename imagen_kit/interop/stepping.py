"""A tableau run from outside, one network evaluation a call, for libraries that own the sampling loop.

Axes: b batch, n network evaluations.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from imagen_kit.errors import KitError
from imagen_kit.samplers.execution import chooser
from imagen_kit.samplers.noise import Generators, gaussian
from imagen_kit.samplers.tableau import Tableau, working_dtype


@dataclass(frozen=True)
class Calls:
    """A tableau cut at its network evaluations.

    Attributes:
        tableau: the tableau.
        evaluations: (n,) rows that evaluate the network, by number.
        steps: (n,) sampling step that each belongs to.
    """

    tableau: Tableau
    evaluations: tuple[int, ...]
    steps: tuple[int, ...]

    @classmethod
    def of(cls, tableau: Tableau) -> Calls:
        """Cut ``tableau``; KitError where the pipeline's loop cannot run it."""
        evaluations, steps, step = [], [], 0
        for i, row in enumerate(tableau.rows):
            if row.also:
                raise KitError(
                    f"sampler {tableau.sampler!r} needs the unconditional prediction too, which a diffusers "
                    "pipeline does not pass on; use renoise='guided'"
                )
            if row.step is not None:
                step = row.step + 1
            if row.t is not None:
                evaluations.append(i)
                steps.append(step)
        if tableau.rows[0].computes or not evaluations or evaluations[0] != 0:
            raise KitError(
                f"sampler {tableau.sampler!r} changes the state before its first evaluation, which a "
                "diffusers pipeline cannot; use it without churn"
            )
        return cls(tableau, tuple(evaluations), tuple(steps))

    @property
    def times(self) -> list[float]:
        """(n,) native times of the evaluations."""
        return [t for row in self.tableau.rows if (t := row.t) is not None]

    @property
    def order(self) -> int:
        """Calls a step where every step but the last has as many, else 1: what pipelines count in."""
        counts = [self.steps.count(step) for step in range(self.steps[-1] + 1)]
        regular = len(set(counts[:-1])) == 1 and counts[-1] <= counts[0]
        return counts[0] if regular else 1

    def starts(self, call: int) -> bool:
        """Whether the call is the first of a sampling step."""
        return call == 0 or self.steps[call] != self.steps[call - 1]


class Run:
    """One run through a tableau: the slots between two calls.

    States narrower than float32 are kept in it, and used as long as the pipeline hands back what it was given.
    """

    def __init__(self, calls: Calls):
        self.plan = calls.tableau.plan.operations
        self.evaluations, self.call = calls.evaluations, 0
        self.slots: dict[int, Tensor] = {}
        self._given: tuple[Tensor, int, Tensor] | None = None

    @property
    def t(self) -> float:
        """Native time of the next call."""
        return self.plan[self.evaluations[self.call]].t

    @property
    def finished(self) -> bool:
        """Whether the last call has been made."""
        return self.call == len(self.evaluations)

    def remember(self, out: Tensor, state: Tensor) -> None:
        """Keep the state behind ``out``, which the pipeline got."""
        self._given = (out, _version(out), state)

    def advance(self, sample: Tensor, x0: Tensor, generator: Generators | None) -> Tensor:
        """Put in the network's answer at ``sample``, and run the rows up to the next evaluation."""
        work = working_dtype(sample)
        given = self._given
        same = given is not None and given[0] is sample and given[1] == _version(sample)
        state = given[2] if same and given is not None else sample.to(work)
        at = self.evaluations[self.call]
        op = self.plan[at]
        self.slots[op.state] = state
        for slot in op.outputs:
            self.slots[slot] = x0.to(work)
        self._drop(op.dead)
        self.call += 1
        stop = len(self.plan) if self.finished else self.evaluations[self.call] + 1
        draw, total = gaussian(sample, generator), chooser(state, work)
        for op in self.plan[at + 1 : stop]:
            for slot in op.draws:
                self.slots[slot] = draw().to(work)
            if op.terms:
                self.slots[op.state] = total([self.slots[slot] for slot in op.terms], op.weights)
            state = self.slots[op.state]
            if op.t is None:
                self._drop(op.dead)
        return state

    def _drop(self, dead: Sequence[int]) -> None:
        for slot in dead:
            self.slots.pop(slot, None)


def _version(tensor: Tensor) -> int:
    """How often the tensor has been written to; 0 in inference mode, which does not count."""
    return 0 if tensor.is_inference() else tensor._version
