"""The training loop: the same for every task, on one device or many (accelerate).

A step's data and noise come from generators seeded by (seed, step, process), so a run that was killed and
resumed goes through exactly the numbers that an uninterrupted one would have seen.
"""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from imagen_kit.attention import set_backend
from imagen_kit.training import state as checkpoint
from imagen_kit.training.config import OptimizerConfig, TrainConfig


class Task(Protocol):
    """What the loop trains.

    Attributes:
        module: the trained network.
        config: its training settings.
    """

    module: nn.Module
    config: TrainConfig

    def loss(self, module: nn.Module, generator: torch.Generator, device: torch.device) -> dict[str, Tensor]:
        """Draw a batch and return named scalars, among them ``loss``."""

    def preview(self, module: nn.Module) -> Tensor | str | None:
        """A grid (3, h, w) in [0, 1] or a text to log, or None."""

    def export(self, weights: dict[str, Tensor], folder: Path, facts: dict[str, Any]) -> None:
        """Write the averaged weights in the format that recipes load."""


def learning_rate(config: OptimizerConfig, step: int, steps: int) -> float:
    """The rate at ``step`` of ``steps``; see ``OptimizerConfig``."""
    if step < config.warmup:
        return config.learning_rate * (step + 1) / config.warmup
    progress = (step - config.warmup) / max(1, steps - config.warmup)
    factor = {
        "cosine": (1 + math.cos(math.pi * progress)) / 2,
        "linear": 1 - progress,
        "cooldown": min(1.0, (1 - progress) / config.cooldown),
        "constant": 1.0,
    }
    return config.learning_rate * factor[config.decay]


def step_generator(seed: int, step: int, process: int) -> torch.Generator:
    """The source of all randomness of one step of one process."""
    mixed = hash((seed, step, process)) & 0x7FFF_FFFF_FFFF_FFFF  # tuples of ints hash alike in every run
    return torch.Generator().manual_seed(mixed)


def optimizers(module: nn.Module, config: OptimizerConfig) -> list[torch.optim.Optimizer]:
    """The optimizers of a network: AdamW (decaying matrices and kernels only), and Muon before it if asked for."""
    named = [(n, p) for n, p in module.named_parameters() if p.requires_grad]
    inner: set[str] = set()
    built: list[torch.optim.Optimizer] = []
    if config.name == "muon":
        inner = {
            f"{name}.weight"
            for name, layer in module.named_modules()
            if isinstance(layer, nn.Linear) and not name.endswith("lm_head")
        }
        built.append(
            torch.optim.Muon(
                [p for n, p in named if n in inner],
                lr=config.learning_rate,
                weight_decay=config.weight_decay,
                adjust_lr_fn="match_rms_adamw",
            )
        )
    rest = [p for n, p in named if n not in inner]
    groups = [
        {"params": [p for p in rest if p.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in rest if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return [*built, torch.optim.AdamW(groups, lr=config.learning_rate, betas=config.betas, fused=True)]


def train(task: Task, out: Path, *, resume: bool = False, progress: bool = True) -> dict[str, float]:
    """Run the task to its last step, writing checkpoints, logs, previews and at the end the exported weights.

    Args:
        task: what to train.
        out: folder for ``checkpoint.pt``, ``log/`` (TensorBoard), ``samples/`` and ``weights/``.
        resume: continue from ``checkpoint.pt``.
        progress: show a bar with loss, examples/s and time left.

    Returns:
        the last logged scalars.
    """
    from accelerate import Accelerator
    from torch.utils.tensorboard import SummaryWriter

    from imagen_kit.training.progress import TrainingBar

    config = task.config
    cuda = torch.cuda.is_available()
    accelerator = Accelerator(
        mixed_precision="no" if config.precision == "fp32" else config.precision, cpu=not cuda
    )
    device, main = accelerator.device, accelerator.is_main_process
    start, examples = 0, config.batch_size * accelerator.num_processes
    saved = checkpoint.load(out) if resume else None
    if saved is not None:
        task.module.load_state_dict(saved["module"])
        start = saved["step"]
    task.module.to(device)
    ema = checkpoint.Ema(task.module, config.ema)
    if saved is not None:
        ema.shadow = {k: v.to(device) for k, v in saved["ema"].items()}
    optimizing = optimizers(task.module, config.optimizer)
    if saved is not None:
        for optimizer, kept in zip(optimizing, saved["optimizers"], strict=True):
            optimizer.load_state_dict(kept)
    del saved
    module, *optimizing = accelerator.prepare(task.module, *optimizing)
    plain = accelerator.unwrap_model(module)
    stepped: Any = torch.compile(module) if config.compile else module
    if config.attention == "auto":
        # Measured: the CPU's fused kernel is several times slower than plain products in the backward pass.
        set_backend("sdpa" if device.type == "cuda" else "eager")
    else:
        set_backend(config.attention)
    writer = SummaryWriter(str(out / "log"), purge_step=start) if main else None
    totals: dict[str, Tensor] = {}
    last: dict[str, float] = {}
    module.train()

    def snapshot(step: int) -> None:
        if main:
            kept = [optimizer.state_dict() for optimizer in optimizing]
            state = {"step": step, "module": plain.state_dict(), "ema": ema.shadow, "optimizers": kept}
            checkpoint.save(out, state)

    with TrainingBar(config.steps, start, examples, enabled=progress and main) as bar:
        began, step = time.perf_counter(), start
        try:
            for step in range(start, config.steps):
                for optimizer in optimizing:
                    for group in optimizer.param_groups:
                        group["lr"] = learning_rate(config.optimizer, step, config.steps)
                generator = step_generator(config.seed, step, accelerator.process_index)
                with accelerator.autocast():
                    losses = task.loss(stepped, generator, device)
                accelerator.backward(losses["loss"])
                accelerator.clip_grad_norm_(module.parameters(), config.optimizer.clip)
                for optimizer in optimizing:
                    optimizer.step()
                    optimizer.zero_grad(set_to_none=True)
                ema.update(plain, step)
                for key, value in losses.items():
                    totals[key] = totals.get(key, 0) + value.detach()
                done = step + 1
                if done % config.log_every == 0 or done == config.steps:
                    count = (done - start - 1) % config.log_every + 1
                    last = {key: float(value) / count for key, value in totals.items()}
                    last["examples_per_second"] = examples * (done - start) / (time.perf_counter() - began)
                    totals = {}
                    if writer is not None:
                        for key, number in last.items():
                            writer.add_scalar(key, number, done)
                bar.advance(last)
                if main and done % config.sample_every == 0:
                    _preview(task, plain, ema, writer, out, done)
                if done % config.checkpoint_every == 0 or done == config.steps:
                    snapshot(done)
        except KeyboardInterrupt:
            # The interrupted step is repeated on resume: its update may be half done, so the last whole
            # checkpoint stays the one to continue from.
            if writer is not None:
                writer.close()
            raise
    if main:
        facts = {"steps": config.steps, "batch_size": examples, "device": _device_name(device)}
        task.export({k: v.cpu() for k, v in ema.shadow.items()}, out / "weights", facts)
        if writer is not None:
            writer.close()
    return last


def _preview(task: Task, plain: nn.Module, ema: checkpoint.Ema, writer: Any, out: Path, step: int) -> None:
    """Sample with the averaged weights, then put the trained ones back."""
    trained = {k: v.detach().clone() for k, v in plain.state_dict().items()}
    plain.load_state_dict(ema.shadow)
    plain.eval()
    try:
        with torch.no_grad():
            shown = task.preview(plain)
    finally:
        plain.load_state_dict(trained)
        plain.train()
    if isinstance(shown, str):
        writer.add_text("samples", shown, step)
    elif shown is not None:
        from torchvision.utils import save_image

        writer.add_image("samples", shown, step)
        folder = out / "samples"
        folder.mkdir(parents=True, exist_ok=True)
        save_image(shown, folder / f"{step:07d}.png")


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {torch.get_num_threads()} threads"
