"""Training of one diffusion stage on the frozen text features of a recipe's encoder.

Loss (Ho et al. 2020 and successors): E w(t) |network(alpha x0 + sigma noise, t, text, low-res) - target|².
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from imagen_kit import prediction
from imagen_kit.conditioning import Cond, TextEmbeddings
from imagen_kit.data.base import Dataset
from imagen_kit.sending import send
from imagen_kit.training.config import TimesConfig, TrainConfig


class TextCache:
    """Features of every prompt seen, kept in bfloat16 on the CPU; each prompt is encoded once.

    Args:
        encoder: a frozen text encoder.
        length: pad to this many tokens (fixed shapes for a compiled network), or None for the batch's longest.
    """

    def __init__(self, encoder: Any, length: int | None = None):
        self.encoder, self.length = encoder, length
        self._rows: dict[str, tuple[Tensor, Tensor | None]] = {}

    def __call__(self, prompts: list[str], device: torch.device) -> TextEmbeddings:
        """Embeddings of the prompts, float32, on ``device``."""
        new = sorted(set(prompts) - self._rows.keys())
        if new:
            answer = self.encoder(new)
            pooled = (
                [None] * len(new) if answer.pooled is None else list(answer.pooled.to("cpu", torch.bfloat16))
            )
            for i, prompt in enumerate(new):
                tokens = answer.tokens[i][answer.mask[i]].to("cpu", torch.bfloat16)
                self._rows[prompt] = tokens, pooled[i]
        rows = [self._rows[prompt] for prompt in prompts]
        length = self.length or max(len(tokens) for tokens, _ in rows)
        tokens = torch.zeros(len(rows), length, rows[0][0].shape[1])
        mask = torch.zeros(len(rows), length, dtype=torch.bool)
        for i, (row, _) in enumerate(rows):
            tokens[i, : len(row)] = row
            mask[i, : len(row)] = True
        vectors = [vector for _, vector in rows if vector is not None]
        pooled_rows = torch.stack(vectors).float().to(device) if vectors else None
        return TextEmbeddings(tokens.to(device), mask.to(device), pooled_rows)


def draw_times(config: TimesConfig, n: int, schedule: Any, generator: torch.Generator) -> Tensor:
    """(n,) native times in [t_min, t_max], float64; see ``TimesConfig``."""
    if config.name == "logit_normal":
        z = torch.randn(n, generator=generator, dtype=torch.float64)
        u = torch.sigmoid(config.mean + config.std * z)
    else:
        u = torch.rand(n, generator=generator, dtype=torch.float64)
    noisy = 1 - config.width * torch.rand(n, generator=generator, dtype=torch.float64)
    in_tail = torch.rand(n, generator=generator, dtype=torch.float64) < config.tail
    u = torch.where(in_tail, noisy, u)
    return schedule.t_min + (schedule.t_max - schedule.t_min) * u


def denoising_loss(
    module: Callable[..., Tensor],
    schedule: Any,
    told: str,
    x0: Tensor,
    noise: Tensor,
    t: Tensor,
    cond: Cond,
    weight: Callable[[Tensor, Tensor], float | Tensor] = lambda alpha, sigma: 1.0,
    sigma_data: float = 0.5,
) -> Tensor:
    """Mean over the batch of w(t) · the mean squared error of what the network says, a scalar in float32.

    Args:
        module: ``module(x, t, cond)``; channels beyond those of x0 (a learned variance) are left out.
        schedule: noise schedule.
        told: its prediction.
        x0, noise: (b, c, h, w).
        t: (b,) native times, float64 on the host.
        cond: conditioning of the batch.
        weight: of the squared error, from alpha and sigma (b,).
        sigma_data: spread of the data, for ``edm``.
    """
    alpha, sigma = schedule.alpha_sigma(t)
    scale = torch.as_tensor(weight(alpha, sigma), dtype=torch.float64).expand_as(t)
    t, alpha, sigma, scale = send(torch.stack([t, alpha, sigma, scale]), x0.device)
    x = schedule.add_noise(x0, noise, t)
    goal = prediction.target(told, x0, noise, alpha, sigma, sigma_data)
    seen, time = prediction.network_input(told, x, t, alpha, sigma, sigma_data)
    output = module(seen, time.float(), cond).float()[:, : x0.shape[1]]
    error = (output - goal).square().flatten(1).mean(1)
    return (error * scale.float()).mean()


class DiffusionTask:
    """One stage of a recipe with its data.

    Args:
        config: training settings.
        module: the denoiser, freshly initialised.
        stage: ``StageSpec`` of the recipe (name, prediction, size, sigma_data).
        parts: its schedule, codec, sampler, guidance and ``low_res``, by name.
        encoder: frozen text encoder.
        dataset: captioned pictures.
        low_size: side of the picture of the stage before, None for a first stage.
        unconditional: "empty" (features of the empty prompt) or "zeros", what dropped prompts become.
    """

    def __init__(
        self,
        config: TrainConfig,
        module: nn.Module,
        stage: Any,
        parts: dict[str, Any],
        encoder: Any,
        dataset: Dataset,
        low_size: int | None = None,
        unconditional: str = "empty",
    ):
        self.config, self.module, self.stage = config, module, stage
        self.schedule, self.codec = parts["schedule"], parts["codec"]
        self.sampler, self.guidance, self.low_res = (parts[key] for key in ("sampler", "guidance", "low_res"))
        self.dataset, self.low_size, self.unconditional = dataset, low_size, unconditional
        self.text = TextCache(encoder, encoder.max_length if config.compile else None)

    def _text(self, captions: list[str], keep: Tensor, device: torch.device) -> TextEmbeddings:
        """Features of the captions, those not kept replaced by the unconditional ones."""
        if self.unconditional == "empty":
            return self.text([c if k else "" for c, k in zip(captions, keep.tolist(), strict=True)], device)
        told = self.text(captions, device)
        gate = keep.to(device)
        pooled = None if told.pooled is None else told.pooled * gate[:, None]
        return TextEmbeddings(told.tokens * gate[:, None, None], told.mask, pooled)

    def loss(self, module: nn.Module, generator: torch.Generator, device: torch.device) -> dict[str, Tensor]:
        config, stage = self.config, self.stage
        n = config.batch_size
        examples = self.dataset.batch(n, stage.size, generator, self.low_size)
        x0 = self.codec.encode(examples.pictures.to(device))
        noise = torch.randn(x0.shape, generator=generator).to(device)
        t = draw_times(config.times, n, self.schedule, generator)
        keep = torch.rand(n, generator=generator) >= config.text_dropout
        text = self._text(examples.captions, keep, device)
        shown: Mapping[str, Any] = {}
        if examples.low_res is not None:
            low, high = config.low_res_level
            level = (low + (high - low) * torch.rand(n, generator=generator)).to(device)
            grain = torch.randn(n, 3, *x0.shape[-2:], generator=generator).to(device)
            shown = self.low_res(examples.low_res.to(device), x0.shape[-1], level, grain)
        cond = Cond(tokens=text.tokens, mask=text.mask, pooled=text.pooled, **shown)

        def weight(alpha: Tensor, sigma: Tensor) -> Any:
            return prediction.loss_weight(
                stage.prediction, alpha, sigma, config.loss_weight, config.min_snr_gamma, stage.sigma_data
            )

        loss = denoising_loss(
            module, self.schedule, stage.prediction, x0, noise, t, cond, weight, stage.sigma_data
        )
        return {"loss": loss}

    @torch.no_grad()
    def preview(self, module: nn.Module, n: int = 16) -> Tensor:
        """Pictures of held-out captions by the recipe's sampler and guidance, as a grid in [0, 1].

        Guidance by another network sits out, since only this one is there.
        """
        from torchvision.utils import make_grid

        from imagen_kit.denoise import denoise_fn
        from imagen_kit.guidance.base import TEXT, renoised

        device = next(module.parameters()).device
        examples = self.dataset.examples(n, self.stage.size, self.low_size)
        generator = torch.Generator().manual_seed(0)
        told = self._text(examples.captions, torch.ones(n, dtype=torch.bool), device)
        null = self._text(examples.captions, torch.zeros(n, dtype=torch.bool), device)
        shared: Mapping[str, Any] = {}
        if examples.low_res is not None:
            side = self.stage.size // self.codec.factor
            grain = torch.randn(n, 3, side, side, generator=generator).to(device)
            shared = self.low_res(examples.low_res.to(device), side, self.stage.low_res_level, grain)
        guidance = [s for s in self.guidance if not any(branch.network for branch in s.needs)]
        texts = {"cond": told, "uncond": null, "null": null}
        for name in {branch.cond for strategy in guidance for branch in strategy.needs} - set(texts):
            texts[name] = self._text([name.removeprefix(TEXT)] * n, torch.ones(n, dtype=torch.bool), device)
        conds = {k: Cond(tokens=e.tokens, mask=e.mask, pooled=e.pooled, **shared) for k, e in texts.items()}
        denoise = denoise_fn(
            module,
            self.schedule,
            self.stage.prediction,
            cond=conds.pop("cond"),
            others=conds,
            guidance=guidance,
            sigma_data=self.stage.sigma_data,
        )
        shape = self.codec.encode(examples.pictures[:1]).shape[1:]
        noise = torch.randn(n, *shape, generator=generator).to(device)
        x = noise * self.schedule.prior_std(self.schedule.t_max)
        sampler = renoised(self.sampler, guidance)
        x0 = sampler.sample(denoise, x, self.schedule, self.stage.sampler.steps, generator=generator)
        return make_grid(self.codec.decode(x0).clamp(-1, 1).cpu() / 2 + 0.5, nrow=math.isqrt(n))

    def export(self, weights: dict[str, Tensor], folder: Path, facts: dict[str, Any]) -> None:
        """Averaged weights in bfloat16, ``<stage>.safetensors``, and ``<stage>.json`` with how they came about."""
        from imagen_kit.weights import save_safetensors

        folder.mkdir(parents=True, exist_ok=True)
        half = {k: v.to(torch.bfloat16) if v.is_floating_point() else v for k, v in weights.items()}
        save_safetensors(folder / f"{self.stage.name}.safetensors", half)
        card = {
            "stage": self.stage.name,
            **facts,
            "parameters": sum(p.numel() for p in self.module.parameters()),
            "train": self.config.model_dump(mode="json"),
        }
        (folder / f"{self.stage.name}.json").write_text(json.dumps(card, indent=2) + "\n")
