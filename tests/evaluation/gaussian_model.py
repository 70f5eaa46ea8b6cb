"""A two-stage pipeline whose exact picture is known: pixels are N(MEAN, STD²), and their ODE is solved."""

from __future__ import annotations

import math

import torch
from torch import nn

from imagen_kit import samplers, schedules
from imagen_kit.conditioning import TextEmbeddings
from imagen_kit.evaluation.subjects import RecipeSubject
from imagen_kit.pipeline import Pipeline
from imagen_kit.stage import Stage

MEAN, STD = 0.2, 0.15


class Words(nn.Module):
    """Text embeddings that say nothing."""

    def forward(self, prompts):
        n = len(prompts)
        return TextEmbeddings(torch.zeros(n, 1, 4), torch.ones(n, 1, dtype=torch.bool))


class Gaussian(nn.Module):
    """The exact x0-prediction, with a weight so that there is one, which can be interrupted or spoiled."""

    def __init__(self, schedule):
        super().__init__()
        self.schedule, self.mean, self.calls = schedule, nn.Parameter(torch.tensor(MEAN)), 0
        self.fail_at = self.spoil_from = math.inf

    def forward(self, x, t, cond):
        self.calls += 1
        if self.calls == self.fail_at:
            raise KeyboardInterrupt
        if self.calls >= self.spoil_from:
            return x * math.nan
        alpha, sigma = (v.to(x).reshape(-1, 1, 1, 1) for v in self.schedule.alpha_sigma(t.double()))
        return self.mean + alpha * STD**2 * (x - alpha * self.mean) / (alpha**2 * STD**2 + sigma**2)


class Enlarge(nn.Module):
    """A second stage that returns the first one's picture."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.0))

    def forward(self, x, t, cond):
        return cond.low_res * self.scale


def pipeline(strategies=()):
    schedule = schedules.create("cosine")
    sampler = samplers.create("ddim", spacing="log_snr")
    first = Stage("base", Gaussian(schedule), schedule, "x0", sampler, 16, steps=4, guidance=strategies)
    second = Stage("sr", Enlarge(), schedule, "x0", samplers.create("ddim"), 32, steps=2)
    return Pipeline(Words(), [first, second])


def subject(model=None, **settings):
    return RecipeSubject(model or pipeline(), **{"n": 5, "batch_size": 3, **settings})
