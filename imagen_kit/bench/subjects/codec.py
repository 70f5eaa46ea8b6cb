"""Pictures to latents and back: our autoencoders, and diffusers' AutoencoderKL with the same weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from imagen_kit import codecs
from imagen_kit.bench.peers.networks import twin
from imagen_kit.bench.subject import OURS, Built, Subject
from imagen_kit.bench.subjects import register
from imagen_kit.bench.work import TORCH, Work, attempt, chosen_peers, randomised
from imagen_kit.errors import KitError, unknown

PEERS = ("diffusers", "diffusers compiled")
WORK = ("encode", "decode")


def _names() -> list[str]:
    return [name for name in codecs.names() if name.startswith("kl")]


@register("codec", names=_names)
def codec(
    name: str,
    device: torch.device,
    *,
    work: str = "decode",
    options: Mapping[str, Any] | None = None,
    resolution: int = 256,
    batch: int = 1,
    dtype: str = "fp32",
    channels_last: bool = False,
    tile: int = 0,
    peers: str = "all",
) -> Built:
    """Encoding or decoding of pictures, weights random.

    Args:
        name: a kl codec.
        device: where.
        work: encode or decode.
        options: its constructor's options.
        resolution: side of the pictures.
        batch: pictures.
        dtype: fp32, bf16 or fp16.
        channels_last: memory format, for all.
        tile: side in latents of the tiles that ours decodes one after another; 0 for the whole. diffusers blends
            its tiles in another way, so against tiles it is not compared by its result, and decodes the whole.
        peers: all, none, or some of diffusers, diffusers compiled, separated by commas.

    Raises:
        KitError: a value that there is not.
    """
    for what, value, choices in (("work of a codec", work, WORK), ("dtype", dtype, TORCH)):
        if value not in choices:
            raise KitError(unknown(what, value, choices))
    wanted = chosen_peers(peers, PEERS)
    ours: Any = randomised(codecs.create(name, **{**(options or {}), "tile": tile}), device)
    side = resolution if work == "encode" else resolution // ours.factor
    shape = (batch, ours.picture_channels if work == "encode" else ours.channels, side, side)
    given = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(device, TORCH[dtype])
    scale, shift = ours.scale, ours.shift

    def subject(
        module: nn.Module, run: Callable[[], Tensor], note: str, eager: Callable[[], Tensor] | None = None
    ) -> Subject:
        note = ", ".join([note, dtype, *(["channels_last"] if channels_last else [])])
        return Work(
            torch.no_grad()(run),
            "pictures",
            batch,
            modules=[module],
            inputs=[given],
            note=note,
            eager=torch.no_grad()(eager or run),
            comparable=not tile,
        )

    def theirs(compiled: bool) -> Subject:
        def by(encoder: Any, decoder: Any) -> Tensor:
            if work == "encode":
                return scale * (encoder(given, return_dict=False)[0].mean - shift)
            return decoder(given / scale + shift, return_dict=False)[0]

        def run() -> Tensor:
            return by(encode, decode)

        encode, decode = model.encode, model.decode
        if compiled:
            encode, decode = torch.compile(encode), torch.compile(decode)
        note = "AutoencoderKL" + (", torch.compile" if compiled else "")
        return subject(model, run, note, lambda: by(model.encode, model.decode))

    built: Built = {
        OURS: subject(ours, lambda: getattr(ours, work)(given), f"tiles of {tile}" if tile else "whole")
    }
    found = attempt(lambda: twin(ours, resolution)) if wanted else None
    for module in filter(lambda part: isinstance(part, nn.Module), (ours, found)):
        module.to(dtype=TORCH[dtype], memory_format=torch.channels_last if channels_last else None)
    model: Any = found
    for who in wanted:
        if isinstance(found, nn.Module):
            built[who] = theirs(who == PEERS[1])
        elif found is not None:
            built[who] = found
    return built
