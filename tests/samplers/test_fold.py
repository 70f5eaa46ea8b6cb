"""Prediction and guidance folded into a tableau: the same samples from raw outputs."""

from __future__ import annotations

import pytest
import torch
from sampler_oracles import gaussian_denoiser

from imagen_kit import prediction, samplers, schedules
from imagen_kit.errors import KitError
from imagen_kit.samplers.noise import gaussian

LINEAR = [name for name in samplers.names() if samplers.describe(name)["linear"]]
SCHEDULE = schedules.create("scaled_linear")
X = torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


class Raw:
    """Raw outputs of a network that knows Gaussian data, conditional and not."""

    def __init__(self, kind: str, sigma_data: float = 0.5):
        self.kind, self.sigma_data = kind, sigma_data
        self.conditional = gaussian_denoiser(SCHEDULE, 0.3, 0.4)
        self.unconditional = gaussian_denoiser(SCHEDULE, -0.1, 0.9)

    def _output(self, x0: torch.Tensor, x: torch.Tensor, t: float) -> torch.Tensor:
        return prediction.from_x0(self.kind, x0, x, *SCHEDULE.alpha_sigma(t), self.sigma_data)

    def __call__(self, x: torch.Tensor, t: float) -> torch.Tensor:
        return self._output(self.conditional(x, t), x, t)

    def parts(self, x: torch.Tensor, t: float, names: tuple[str, ...]) -> tuple[torch.Tensor, ...]:
        assert names == ("uncond",)
        return self(x, t), self._output(self.unconditional(x, t), x, t)


def sample(sampler: str, denoise: object, tableau: object) -> torch.Tensor:
    return tableau.run(denoise, X, gaussian(X, torch.Generator().manual_seed(1)))  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", LINEAR)
def test_every_sampler_folds(name: str) -> None:
    tableau = samplers.create(name).tableau(SCHEDULE, 10)
    folded = tableau.fold(SCHEDULE, "v")
    assert folded.nfe == tableau.nfe
    assert folded.noises == tableau.noises
    expected = sample(name, Raw("v").conditional, tableau)
    # float64 on values of order one; dpm2 and heun weigh single answers up to 1e2 on this grid.
    torch.testing.assert_close(sample(name, Raw("v"), folded), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", prediction.PREDICTIONS)
@pytest.mark.parametrize("scale", [None, 1.0, 7.5])
def test_every_prediction_and_constant_guidance_fold(kind: str, scale: float | None) -> None:
    raw, tableau = Raw(kind), samplers.create("dpmpp_3m_sde").tableau(SCHEDULE, 12)

    def guided(x: torch.Tensor, t: float) -> torch.Tensor:
        cond, uncond = raw.conditional(x, t), raw.unconditional(x, t)
        return cond if scale is None else uncond + scale * (cond - uncond)

    expected = sample("dpmpp_3m_sde", guided, tableau)
    folded = tableau.fold(SCHEDULE, kind, guidance_scale=scale)
    assert folded.plan.parts == (() if scale is None else ("uncond",))
    # eps loses digits at the noisy start, where alpha = 0.07: 1/alpha² of 1e-16, times the scale.
    tolerance = 1e-12 if kind != "eps" else 1e-11
    torch.testing.assert_close(sample("", raw, folded), expected, rtol=tolerance, atol=tolerance)


def test_sigma_data_is_folded_too() -> None:
    tableau = samplers.create("heun").tableau(SCHEDULE, 6)
    raw = Raw("edm", sigma_data=1.3)
    out = sample("heun", raw, tableau.fold(SCHEDULE, "edm", sigma_data=1.3))
    torch.testing.assert_close(out, sample("heun", raw.conditional, tableau), rtol=1e-12, atol=1e-12)


def test_the_unconditional_slot_of_the_sampler_is_folded() -> None:
    """cfg++ reads the unconditional x0 itself; its answers fold like any other."""
    tableau = samplers.create("ddim", renoise="uncond").tableau(SCHEDULE, 6)
    raw = Raw("v")

    class Denoise:
        def parts(self, x: torch.Tensor, t: float, names: tuple[str, ...]) -> tuple[torch.Tensor, ...]:
            return raw.conditional(x, t), raw.unconditional(x, t)

    expected = sample("ddim", Denoise(), tableau)
    torch.testing.assert_close(
        sample("ddim", raw, tableau.fold(SCHEDULE, "v")), expected, rtol=1e-12, atol=1e-12
    )
    with pytest.raises(
        KitError, match="guidance does not fold into sampler 'ddim', which takes the prediction 'uncond'"
    ):
        tableau.fold(SCHEDULE, "v", guidance_scale=3.0)


def test_what_does_not_fold() -> None:
    with pytest.raises(KitError, match="unknown prediction 'epz'; did you mean 'eps'"):
        samplers.create("ddim").tableau(SCHEDULE, 3).fold(SCHEDULE, "epz")
    flow = schedules.create("flow")
    tableau = samplers.create("euler").tableau(flow, timesteps=[1.0, 0.5])
    with pytest.raises(KitError, match="'eps' does not tell x0 where alpha = 0"):
        tableau.fold(flow, "eps")
