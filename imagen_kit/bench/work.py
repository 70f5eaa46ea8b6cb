"""Subjects made of functions, and networks with random weights and inputs to try them on.

Axes: b batch, c h w picture, n text tokens, d token width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from imagen_kit import denoisers
from imagen_kit.bench.subject import Subject, Unavailable
from imagen_kit.conditioning import Cond
from imagen_kit.errors import KitError, unknown
from imagen_kit.hollow import hollow_parameters
from imagen_kit.performance import Performance
from imagen_kit.samplers.graphs import CudaGraph, warm_up

T = TypeVar("T")
#: How a network is run, by name → (what is compiled, whether a CUDA graph of it is replayed).
MODES = {
    "eager": ("off", False),
    "compile": ("whole", False),
    "compile_blocks": ("blocks", False),
    "graph": ("off", True),
    "compile_graph": ("whole", True),
}
ALL, NONE = "all", "none"
TORCH = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Work(Subject):
    """A subject whose work is a function; what is not said here is told in ``Subject``.

    Args:
        run: does the work once.
        unit, units: what is counted, and how many of it a call does.
        eager: the same work operation by operation, where ``run`` is compiled or replayed from a graph.
    """

    def __init__(
        self,
        run: Callable[[], Tensor | None],
        unit: str,
        units: int,
        *,
        modules: Sequence[nn.Module] = (),
        inputs: Sequence[Tensor] = (),
        note: str = "",
        eager: Callable[[], Tensor | None] | None = None,
        steps: int | None = None,
        passes: int = 1,
        precision: str | None = None,
        comparable: bool = True,
    ):
        self._run, self._eager = run, eager or run
        self.unit, self.units, self.modules, self.inputs, self.note = unit, units, modules, inputs, note
        self.steps, self.passes, self.precision, self.comparable = steps, passes, precision, comparable

    def __call__(self) -> Tensor | None:
        """Do the work once."""
        return self._run()

    def eager(self) -> Tensor | None:
        """Do it once, nothing compiled or replayed."""
        with torch.compiler.set_stance("force_eager"):
            return self._eager()

    def close(self) -> None:
        """Forget the work, and with it the networks and tensors that it holds."""
        self._run = self._eager = lambda: None
        self.modules, self.inputs = (), ()


@dataclass(frozen=True)
class Way:
    """How the networks of a case are run: the kit's and, as far as they can, the peers'.

    Attributes:
        dtype: ``fp32``, ``bf16``, ``fp16``, or ``auto``: the kit's choice, which the peers then take over.
        channels_last: run convolutions in that memory format; None leaves it to the kit, and peers as they are.
        mode: one of ``MODES``.
        attention: backend of the kit's attention.
        quantise: of the kit's weights.
        prepack: the kit's weights, for a CPU; None leaves it to the kit where the dtype is, too.

    Raises:
        KitError: a value that there is not.
    """

    dtype: str = "fp32"
    channels_last: bool | None = None
    mode: str = "eager"
    attention: str | None = None
    quantise: str = "off"
    prepack: bool | None = None

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise KitError(unknown("mode", self.mode, MODES))
        self.performance  # noqa: B018 - checks the other values

    @property
    def performance(self) -> Performance:
        """The kit's choices."""
        formats = {None: None, True: "channels_last", False: "contiguous"}
        return Performance(
            dtype=self.dtype,
            memory_format=formats[self.channels_last],
            compile=MODES[self.mode][0],
            quantise=self.quantise,
            attention=self.attention,
            prepack=self.prepack,
        )

    def lacks(self, device: torch.device) -> str | None:
        """Why this way cannot be gone on a device; None where it can."""
        if self.graph and device.type != "cuda":
            return f"mode {self.mode} replays a CUDA graph, and this is a {device.type} device"
        return None

    @property
    def graph(self) -> bool:
        """Whether a CUDA graph is replayed."""
        return MODES[self.mode][1]


def chosen_peers(peers: str, known: Sequence[str]) -> list[str]:
    """The peers to build, in their usual order.

    Args:
        peers: ``all``, ``none``, or names separated by commas.
        known: of this kind.

    Raises:
        KitError: a name that is not among them.
    """
    if peers in (ALL, NONE):
        return list(known) if peers == ALL else []
    asked = [name.strip() for name in peers.split(",")]
    for name in asked:
        if name not in known:
            raise KitError(unknown("peer", name, (*known, ALL, NONE)))
    return [name for name in known if name in asked]


def attempt(build: Callable[[], T]) -> T | Unavailable:
    """A peer (or its model), or in one line why it cannot be had: a missing package, work that it does not do."""
    try:
        return build()
    except (KitError, ImportError) as error:
        return Unavailable(" ".join(str(error).split()))


class Replayed:
    """A function's operations as a CUDA graph, captured when it is first called.

    Args:
        run: works on tensors that stay where they are, and reads nothing back.
    """

    def __init__(self, run: Callable[[], Tensor]):
        self._run, self._out = run, torch.empty(0)
        self._graph: CudaGraph | None = None

    def __call__(self) -> Tensor:
        """Replay; the answer is the same tensor every time."""
        if self._graph is None:
            device = torch.device("cuda")
            warm_up(self._run, device)
            graph = CudaGraph(device)
            self._out = graph.record(self._run)
            self._graph = graph
        self._graph.replay()
        return self._out


def dtype_of(module: nn.Module) -> torch.dtype:
    """The dtype that a network is fed with: that of its first floating parameter."""
    return next((p.dtype for p in module.parameters() if p.is_floating_point()), torch.float32)


def random_network(
    name: str, options: Mapping[str, Any] | None, device: torch.device, seed: int = 0
) -> nn.Module:
    """A registered denoiser in float32 and evaluation mode, every weight random and none degenerate.

    Layers that would start at zero are random too, so that outputs tell networks apart. Nothing is initialised
    twice: weights are drawn on the device, matrices with a spread of (inputs)^(-1/2).

    Raises:
        KitError: unknown name or option.
    """
    with hollow_parameters():
        network = denoisers.create(name, **(options or {}))
    return randomised(network, device, seed)


def randomised(module: nn.Module, device: torch.device, seed: int = 0) -> nn.Module:
    """``module`` on the device, all its parameters drawn anew (see ``random_network``), in evaluation mode."""
    generator = torch.Generator(device).manual_seed(seed)
    made: dict[int, nn.Parameter] = {}
    for holder in module.modules():
        for name, old in holder._parameters.items():
            if old is not None:
                if id(old) not in made:
                    made[id(old)] = nn.Parameter(_draw(name, old.shape, generator), old.requires_grad)
                holder._parameters[name] = made[id(old)]
        for name, buffer in holder._buffers.items():
            if buffer is not None:
                holder._buffers[name] = buffer.to(device)
    for name, table in module.named_buffers():
        if name == "pos_embed":  # a stored table, which an empty network leaves unset
            table.normal_(generator=generator)
    return module.eval()


def _draw(name: str, shape: torch.Size, generator: torch.Generator) -> Tensor:
    drawn = torch.randn(shape, generator=generator, device=generator.device)
    if len(shape) > 1:
        return drawn * max(1, shape[1:].numel()) ** -0.5
    return 0.2 * drawn + ("bias" not in name)  # gains are about 1


@dataclass(frozen=True)
class Told:
    """What a network is called with; ``times`` are native times, of the schedule it was published with."""

    x: Tensor
    times: Tensor
    cond: Cond

    def to(self, dtype: torch.dtype) -> Told:
        """In a network's dtype; times and other numbers that are embedded stay float32."""
        return Told(self.x.to(dtype), self.times, self.cond.to(dtype=dtype))

    @property
    def tensors(self) -> list[Tensor]:
        """All of them."""
        parts = [value for value in vars(self.cond).values() if isinstance(value, Tensor)]
        return [self.x, self.times, *parts]


def random_inputs(
    network: nn.Module, batch: int, resolution: int, tokens: int, device: torch.device, seed: int = 1
) -> Told:
    """Inputs of every kind that ``network`` takes, by its ``inputs``, float32.

    Args:
        network: a denoiser.
        batch: b.
        resolution: side of x, which for a latent model is that of the latents.
        tokens: n.
        device: where they go.
        seed: of the numbers.

    Raises:
        KitError: a network that does not say what it takes.
    """
    wanted = getattr(network, "inputs", None)
    if wanted is None:
        raise KitError(f"a {type(network).__name__} does not say what it is called with, so it has no row")
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draw).to(device)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(shape, generator=draw).to(device)

    told: dict[str, Any] = {}
    if wanted.context_dim is not None:
        told["tokens"] = normal(batch, tokens, wanted.context_dim)
    if wanted.pooled_dim is not None:
        told["pooled"] = normal(batch, wanted.pooled_dim)
    if wanted.num_classes is not None:
        told["labels"] = torch.randint(wanted.num_classes, (batch,), generator=draw).to(device)
    if wanted.low_res_channels:
        told["low_res"] = normal(batch, wanted.low_res_channels, resolution, resolution)
        told["low_res_level"] = uniform(batch)
    if wanted.size_numbers:
        told["size"] = (1024 * uniform(batch, wanted.size_numbers)).round()
    if getattr(network, "guidance_in", None) is not None:
        told["guidance"] = 1 + 4 * uniform(batch)
    # a network built without a schedule is told times of 0 to 1000
    times = 1000 / time_scale(network) * uniform(batch)
    return Told(normal(batch, wanted.in_channels, resolution, resolution), times, Cond(**told))


def time_scale(network: nn.Module) -> float:
    """The factor on native time inside ``network``'s time embedding."""
    from imagen_kit.denoisers.layers.embeddings import TimestepEmbedder

    named = ("time", "t_embedder", "time_in")
    own = [getattr(network, name, None) for name in named]
    embedders = getattr(network, "embedders", None)
    if embedders is not None:
        own.append(embedders[0].t_embedder)
    found = next((part for part in own if isinstance(part, TimestepEmbedder)), None)
    return 1.0 if found is None else found.scale
