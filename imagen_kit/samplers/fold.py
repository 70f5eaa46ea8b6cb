"""Prediction type and constant guidance folded into a tableau's weights."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from imagen_kit import prediction as predictions
from imagen_kit.errors import KitError
from imagen_kit.samplers.tableau import Form, Row

if TYPE_CHECKING:
    from imagen_kit.samplers.tableau import Tableau
    from imagen_kit.schedules.base import Schedule


def fold(
    tableau: Tableau,
    schedule: Schedule,
    prediction: str,
    guidance_scale: float | None = None,
    sigma_data: float = 0.5,
) -> Tableau:
    """See ``Tableau.fold``.

    An evaluation of the state s gives x0 = a s + b o for its output o, so that every later weight w of x0 is
    w a of s and w b of o. With guidance, o = u + scale (c - u) of the conditional and unconditional outputs.
    """
    meaning: dict[str, Form] = {}  # of every answer x0, in slots of the folded rows
    rows: list[Row] = []
    for row in tableau.rows:
        if row.computes:
            form = Form({})
            for slot, weight in row.weights:
                form = form + weight * meaning.get(slot, Form({slot: 1.0}))
            row = replace(row, weights=_weights(form))
        elif row.state in meaning:  # a state that is an answer itself: now there is something to compute
            kept = f"{row.state}'"
            form, meaning[row.state] = meaning[row.state], Form({kept: 1.0})
            row = replace(row, state=kept, weights=_weights(form))
        if row.t is not None:
            outputs = list(row.outputs)
            a, b = predictions.coefficients(prediction, *schedule.alpha_sigma(row.t), sigma_data)
            if guidance_scale is not None:
                if row.also:
                    raise KitError(
                        f"guidance does not fold into sampler {tableau.sampler!r}, which takes the prediction "
                        f"{row.also[0]!r} for itself"
                    )
                outputs.append(f"{outputs[0]}:uncond")
                row = replace(row, outputs=tuple(outputs), also=("uncond",))
                mixed = Form({outputs[0]: guidance_scale, outputs[1]: 1 - guidance_scale})
                meaning[outputs[0]] = Form({row.state: a}) + b * mixed
            else:
                for output in outputs:
                    meaning[output] = Form({row.state: a, output: b})
        rows.append(row)
    return replace(tableau, rows=tuple(rows))


def _weights(form: Form) -> tuple[tuple[str, float], ...]:
    return tuple((slot, weight) for slot, weight in form.terms.items() if weight != 0.0)
