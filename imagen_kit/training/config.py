"""The ``train:`` section of a recipe, validated."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class OptimizerConfig(Strict):
    """AdamW or Muon with warm-up, then the learning rate falls to zero along ``decay``.

    ``muon`` orthogonalises the momentum of the matrices inside the network (Jordan et al. 2024), scaled to the step
    size of AdamW (Liu et al. 2025), and leaves embeddings, kernels, gains and biases to AdamW.
    ``cooldown`` holds the rate and lets it fall linearly over the last share ``cooldown`` of the steps, so that a
    run can be made longer while it is on its plateau.
    """

    name: Literal["adamw", "muon"] = "adamw"
    learning_rate: float = Field(1e-3, gt=0)
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = Field(0.0, ge=0)
    warmup: int = Field(200, ge=0, description="steps of linear warm-up")
    decay: Literal["cosine", "linear", "cooldown", "constant"] = "cosine"
    cooldown: float = Field(0.3, gt=0, le=1)
    clip: float = Field(1.0, gt=0, description="largest norm of the gradient")


class TimesConfig(Strict):
    """How training times are drawn, as quantiles of a unit variable mapped onto [t_min, t_max].

    ``uniform`` is the plain choice for discrete-beta schedules. ``logit_normal`` draws
    u = sigmoid(mean + std z) (Esser et al. 2024); a ``mean`` above zero prefers noisy times.
    ``tail`` mixes in that share of draws uniform in the noisiest part [1 - width, 1] of the range, where the
    picture's layout is decided by the text alone.
    """

    name: Literal["uniform", "logit_normal"] = "uniform"
    mean: float = 0.0
    std: float = Field(1.0, gt=0)
    tail: float = Field(0.0, ge=0, le=1)
    width: float = Field(0.2, gt=0, le=1)


class TrainConfig(Strict):
    """Everything that a training run is told besides its parts."""

    task: Literal["diffusion", "text"] = "diffusion"
    stage: str | None = Field(None, description="name of the stage to train; the only one by default")
    init: Literal["random", "weights"] = Field(
        "random", description="weights: go on from the stage's weight file"
    )
    data: dict[str, Any] = Field(default_factory=lambda: {"name": "pocket"})
    steps: int = Field(10_000, ge=1)
    batch_size: int = Field(64, ge=1, description="pictures (or texts) a step and process")
    seed: int = 0
    precision: Literal["fp32", "bf16", "fp16"] = "bf16"
    optimizer: OptimizerConfig = OptimizerConfig()
    ema: Annotated[float, Field(ge=0, lt=1)] = 0.999
    times: TimesConfig = TimesConfig()
    loss_weight: Literal["uniform", "min_snr", "edm"] = "uniform"
    min_snr_gamma: float = Field(5.0, gt=0)
    text_dropout: float = Field(0.1, ge=0, le=1, description="share of prompts replaced by the empty one")
    low_res_level: tuple[float, float] = Field(
        (0.0, 1.0), description="range of the noise level of a low-res input"
    )
    compile: bool = False
    attention: str = Field("auto", description="attention backend; auto is sdpa on a GPU, eager on the CPU")
    checkpoint_every: int = Field(500, ge=1, description="steps")
    sample_every: int = Field(2000, ge=1, description="steps")
    log_every: int = Field(50, ge=1, description="steps")
