"""On paper: what one GPU, 8 and 1,000 would give for a cascade of the paper's size, from measured shares.

Nothing here is measured but the rates it starts from; every assumption is in the text that ``text`` writes.

Networks are Imagen's (Saharia et al. 2022, appendix F), counted operation by operation on empty tensors; the batch
and the number of training steps are the paper's, which does not state its sampling steps: those are DeepFloyd IF's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from imagen_kit.bench.counts import Counting
from imagen_kit.bench.measure import OK
from imagen_kit.bench.subject import OURS
from imagen_kit.bench.table import number

TOKENS, TEXT_WIDTH, TEXT_PARAMETERS = 128, 4096, 4.63e9  # T5 v1.1 XXL without its embeddings
BATCH, TRAINING_STEPS = 2048, 2.5e6  # of every network of the cascade
#: Published in place of what was not measured: a data sheet's dense bf16 peak, shares of diffusion models on H100.
PUBLISHED_PEAK, PUBLISHED_FORWARD, PUBLISHED_TRAINING = 989e12, 0.50, 0.48
NODE = 8  # GPUs
NEAR, FAR = (
    450e9,
    NODE * 50e9,
)  # bytes a second: of a GPU within its node; of a node, a network card for each GPU
LATENCY = 10e-6  # seconds a message
#: Side of the picture, sampling steps, and the side of the crops it is trained on.
NETWORKS = {
    "imagen_64": (64, 100, 64),
    "imagen_64_to_256": (256, 50, 256),
    "imagen_256_to_1024": (1024, 40, 256),
}
ALIKE = (
    "imagen_64",
    "if_i_xl",
    "if_i_l",
    "sdxl_unet",
    "sd15_unet",
    "adm_256",
)  # networks most like the cascade's


@dataclass(frozen=True)
class Network:
    """One stage: per picture and evaluation, in bf16.

    Attributes:
        flops: of an evaluation.
        training_flops: of an evaluation of what it is trained on.
        parameters: of the network.
        steps: evaluations with and without text each, for one picture.
        messages: exchanges between GPUs that share one picture in bands: convolutions wider than 1 (rows at the
            border), normalisations (sums), attentions (keys and values).
        halo: bytes at one border, all convolutions together.
        gathered: bytes of all keys and values.
    """

    flops: int
    training_flops: int
    parameters: int
    steps: int
    messages: int
    halo: int
    gathered: int


class _Exchanges(TorchFunctionMode):
    """Looks for what GPUs with a band of the picture each would have to tell one another."""

    def __init__(self) -> None:
        super().__init__()
        self.messages = self.halo = self.gathered = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.conv2d and args[1].shape[-1] > 1:
            x, side = args[0], args[1].shape[-1]
            self.messages += 1
            self.halo += 2 * (side // 2) * x.shape[1] * x.shape[-1]
        elif func is functional.scaled_dot_product_attention:
            self.messages += 1
            self.gathered += 2 * (args[1].numel() + args[2].numel())
        self.messages += func is functional.group_norm
        return func(*args, **(kwargs or {}))


@cache
def networks() -> dict[str, Network]:
    """The three stages, counted."""
    found = {}
    for name, (side, steps, crop) in NETWORKS.items():
        flops, parameters, told = _counted(name, side)
        trained = flops if crop == side else _counted(name, crop)[0]
        found[name] = Network(flops, trained, parameters, steps, told.messages, told.halo, told.gathered)
    return found


def _counted(name: str, side: int) -> tuple[int, int, _Exchanges]:
    """(FLOPs, parameters, exchanges) of one evaluation on empty tensors."""
    from imagen_kit import denoisers
    from imagen_kit.conditioning import Cond

    with torch.device("meta"), torch.no_grad():
        network = denoisers.create(name)
        cond = Cond(tokens=torch.zeros(1, TOKENS, TEXT_WIDTH))
        if network.inputs.low_res_channels:
            cond = replace(cond, low_res=torch.zeros(1, 3, side, side), low_res_level=torch.zeros(1))
        with Counting() as counted, _Exchanges() as told:
            network(torch.zeros(1, 3, side, side), torch.zeros(1), cond)
    return counted.flops, sum(p.numel() for p in network.parameters()), told


@dataclass(frozen=True)
class Rates:
    """FLOP/s of one GPU in this work, and where the two come from, in words."""

    forward: float
    training: float
    source: str


def rates(content: Mapping[str, Any] | None) -> Rates:
    """From the results of a GPU: its best row of the network most like the cascade's; else published figures."""
    on_gpu = content is not None and content["environment"]["kind"] == "cuda"
    forward = _best(content, "denoiser") if content and on_gpu else None
    training = _best(content, "training") if content and on_gpu else None
    if content is None or forward is None or training is None:
        words = f"no results of a GPU: {PUBLISHED_FORWARD:.0%} (forward) and {PUBLISHED_TRAINING:.0%} (training) of "
        words += (
            f"{PUBLISHED_PEAK / 1e12:g} TFLOP/s, the best published of diffusion models on an H100 or H200"
        )
        return Rates(PUBLISHED_FORWARD * PUBLISHED_PEAK, PUBLISHED_TRAINING * PUBLISHED_PEAK, words)
    words = (
        f"measured on {content['environment']['device']}: forward {forward[1]} {number(forward[0] / 1e12)} "
    )
    words += f"TFLOP/s, training {training[1]} {number(training[0] / 1e12)} TFLOP/s"
    return Rates(forward[0], training[0], words)


def _best(content: Mapping[str, Any], kind: str) -> tuple[float, str] | None:
    """(FLOP/s, row) of the fastest row of a kind, of networks most like the cascade's where there are any."""
    done = [
        (row["entries"][OURS]["tflops"] * 1e12, row["id"])
        for row in content["rows"]
        if row["kind"] == kind and row["status"] == OK and row["entries"][OURS]["tflops"]
    ]
    for name in ALIKE:
        alike = [pair for pair in done if pair[1].startswith(f"{kind}/{name}/")]
        if alike:
            return max(alike)
    return max(done, default=None)


def evaluation_seconds(network: Network, gpus: int, rate: float) -> float:
    """Seconds of one evaluation for one picture that ``gpus`` share in bands.

    flops/(gpus·rate) + messages·latency + (2 borders·halo + (1 − 1/gpus)·gathered)/bandwidth.
    """
    if gpus == 1:
        return network.flops / rate
    moved = 2 * network.halo + (1 - 1 / gpus) * network.gathered
    return network.flops / gpus / rate + network.messages * LATENCY + moved / NEAR


def picture_seconds(gpus: int, rate: float) -> float:
    """Seconds until one picture is there: half of the GPUs evaluate with the text and half without."""
    text = 2 * TEXT_PARAMETERS * TOKENS / rate
    halves, bands = (1, 1) if gpus == 1 else (2, min(gpus, NODE) // 2)
    total = text
    for network in networks().values():
        each = min(evaluation_seconds(network, n, rate) for n in range(1, bands + 1))
        swap = LATENCY if halves == 2 else 0.0
        total += network.steps * (each * 2 / halves + swap)
    return total


def training_step_seconds(network: Network, gpus: int, rate: float) -> tuple[float, float]:
    """(seconds, share that is arithmetic) of a step with the gradients summed over all GPUs while they come.

    forward + max(backward, 2·(n − 1)/n·4 bytes·parameters/bandwidth); the backward pass is twice the forward pass,
    and the GPU with most pictures of the batch decides.
    """
    pictures = -(-BATCH // gpus)
    forward = pictures * network.training_flops / rate
    bandwidth = NEAR if gpus <= NODE else FAR
    exchange = 2 * (gpus - 1) / gpus * 4 * network.parameters / bandwidth
    seconds = forward + max(2 * forward, exchange)
    return seconds, 3 * BATCH / gpus * network.training_flops / rate / seconds


def text(content: Mapping[str, Any] | None = None, counts: tuple[int, ...] = (1, 8, 1000)) -> str:
    """Assumptions and table, as Markdown.

    Args:
        content: of a results file; None or one of a CPU: published rates.
        counts: of GPUs.
    """
    found, speed = networks(), rates(content)
    once = picture_seconds(1, speed.forward)
    lines = [
        f"Rates of one GPU: {speed.source}.",
        "",
        "| network | parameters | TFLOP an evaluation | evaluations a picture |",
        "|---|---|---|---|",
    ]
    for name, network in found.items():
        counted = (f"{network.parameters / 1e9:.2f} B", f"{network.flops / 1e12:.2f}", f"{2 * network.steps}")
        lines.append(f"| `{name}` | " + " | ".join(counted) + " |")
    lines += [
        "",
        "| GPUs | pictures/s | seconds until one picture | days to train each of the three | arithmetic's share |",
        "|---|---|---|---|---|",
    ]
    for gpus in counts:
        days, shares = [], []
        for network in found.values():
            seconds, share = training_step_seconds(network, gpus, speed.training)
            days.append(f"{number(seconds * TRAINING_STEPS / 86400)}")
            shares.append(f"{share:.0%}")
        cells = [f"{gpus:,}", number(gpus / once), number(picture_seconds(gpus, speed.forward))]
        lines.append("| " + " | ".join([*cells, " + ".join(days), ", ".join(shares)]) + " |")
    return "\n".join([*lines, "", *_assumptions()])


def _assumptions() -> list[str]:
    return [
        f"Assumed: bf16; {TOKENS} tokens through T5-XXL; guidance (two evaluations a step) with "
        + ", ".join(f"{steps} steps at {side}²" for side, steps, _ in NETWORKS.values())
        + " (DeepFloyd IF's; the paper states none); the rate does not fall with the size of the picture or the "
        "batch. Pictures are independent, so pictures/s grow with the GPUs without communication. One picture: "
        "half of a node evaluates with the text and half without, each half sharing the picture in bands as far "
        f"as that pays: arithmetic/n + messages·{LATENCY * 1e6:g} µs + (rows at borders, keys and values)/"
        f"{NEAR / 1e9:g} GB/s; more nodes do not make one picture faster. Training: batch {BATCH}, "
        f"{TRAINING_STEPS / 1e6:g} M steps each, the third network on crops of 256²; 3 × the forward's FLOPs, "
        "gradients (4 bytes a parameter) summed in rings during the backward pass at "
        f"{NEAR / 1e9:g} GB/s within a node and {FAR / 1e9:g} GB/s a node between nodes, and the GPU with most "
        "pictures decides (2048/1000: 3)."
    ]
