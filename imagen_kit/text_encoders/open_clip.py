"""CLIP text towers in open_clip's own format and naming."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from imagen_kit import weights_path
from imagen_kit.errors import KitError, unknown
from imagen_kit.text_encoders import register
from imagen_kit.text_encoders.huggingface import first_line, shortened
from imagen_kit.text_encoders.tokenizers import BpeTokenizer
from imagen_kit.text_encoders.transformer import TransformerEncoder, tower_length

POOLED = ("eos", "projection")
TINY = {"embed_dim": 48, "text_cfg": {"width": 64, "heads": 4, "layers": 2}}
_FILES = ("open_clip_model.safetensors", "model.safetensors", "open_clip_pytorch_model.bin")


@register(
    "open_clip",
    family="open_clip text towers",
    paper="Ilharco et al. 2021; Cherti et al. 2022, arXiv:2212.07143",
)
class OpenClipTextEncoder(TransformerEncoder):
    """Text tower of an open_clip model: causal, so padding at the end never changes a token.

    Args:
        weights: ``random``; a pretrained tag of open_clip (``laion2b_s39b_b160k``, with ``size``); a hub id
            (``owner/name``); a folder with ``open_clip_config.json`` and ``open_clip_model.safetensors``; or
            a ``.safetensors`` file (with ``size``). The image tower in them is never built.
        size: name of an open_clip model (``ViT-H-14``, ``ViT-bigG-14`` ...), ``tiny``, or a dict in the form
            of its model configs (``embed_dim``, ``text_cfg``, ``quick_gelu``). Default ``tiny`` for random
            weights.
        max_length: most tokens of a prompt, start and end included; None for the tower's own (77).
        layer: ``last``, ``penultimate`` (SD 2, SDXL) or a negative number.
        final_norm: apply the final layer norm to that layer (SD 2: yes; SDXL: no).
        pooled: vector of a prompt: ``eos`` (last layer, normed, at the end token, width d), ``projection``
            (that times the text projection, width p), or None.
        padding: ``masked``; ``attended`` for Stable Diffusion (all 77 tokens reach the denoiser); ``kept``.
        pad_to_max: always ``max_length`` tokens (fixed shapes).
        dtype: ``auto`` (fp32), ``fp32``, ``bf16`` or ``fp16``.
        cache: number of prompts remembered.
        seed: of random weights.

    Raises:
        KitError: weights that are absent, truncated, of another model or of another shape; a tower that is
            not causal or not open_clip's own (use ``clip`` or ``t5`` for those).
    """

    def __init__(
        self,
        weights: str | Path = "random",
        size: str | dict[str, Any] | None = None,
        max_length: int | None = None,
        layer: str | int = "last",
        final_norm: bool = True,
        pooled: str | None = "projection",
        padding: str = "masked",
        pad_to_max: bool = False,
        dtype: str = "auto",
        cache: int = 128,
        seed: int = 0,
    ):
        if pooled is not None and pooled not in POOLED:
            raise KitError(unknown("pooled vector", pooled, POOLED))
        network = _build(weights, size, seed)
        longest = network.context_length
        super().__init__(
            "open_clip",
            network,
            BpeTokenizer(network.vocab_size),
            depth=len(network.transformer.resblocks),
            layer=layer,
            padding=padding,
            dtype=dtype,
            dim=network.width,
            pooled_dim={None: None, "eos": network.width, "projection": network.output_dim}[pooled],
            max_length=tower_length("open_clip", max_length, longest),
            pad_to_max=pad_to_max,
            cache=cache,
        )
        self.final_norm = final_norm
        self.pooled = pooled

    def _run(self, ids: Tensor, mask: Tensor, ends: Tensor) -> tuple[Tensor, Tensor | None]:
        # Causal attention hides what follows a token, so real tokens need no mask; outputs at padded
        # positions # are those of `attended` in both padded modes.
        blocks = self._blocks(ids, mask)
        last = self.network.ln_final(blocks[-1])  # type: ignore[operator]
        tokens = blocks[self.block]
        if self.final_norm:
            tokens = self.network.ln_final(tokens)  # type: ignore[operator]
        if self.pooled is None:
            return tokens, None
        pooled = last[torch.arange(len(last), device=last.device), ends]
        if self.pooled == "projection":
            pooled = self._project(pooled)
        return tokens, pooled

    def _project(self, pooled: Tensor) -> Tensor:
        projection: Any = self.network.text_projection
        return projection(pooled) if isinstance(projection, nn.Module) else pooled @ projection

    def _blocks(self, ids: Tensor, mask: Tensor) -> Sequence[Tensor]:
        network: Any = self.network
        x = network.token_embedding(ids) + network.positional_embedding[: ids.shape[1]]
        blocks = [x]
        causal = network.attn_mask[: ids.shape[1], : ids.shape[1]].to(x.dtype)
        for block in network.transformer.resblocks:
            blocks.append(block(blocks[-1], attn_mask=causal))
        return blocks


def _build(weights: str | Path, size: str | dict[str, Any] | None, seed: int) -> Any:
    if str(weights) == "random":
        settings = _settings(size or "tiny")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return _tower(settings)
    file, settings = _find(weights, size)
    network = _tower(settings)
    _load(network, _text_tensors(file), str(weights))
    return network


def _settings(size: str | dict[str, Any]) -> dict[str, Any]:
    import open_clip

    if isinstance(size, dict):
        return size
    settings = TINY if size == "tiny" else open_clip.get_model_config(size)
    if settings is None:
        raise KitError(unknown("open_clip size", size, ["tiny", *open_clip.list_models()]))
    return settings


def _tower(settings: Mapping[str, Any]) -> Any:
    """The text tower alone, without the image tower its config may describe."""
    import open_clip

    text = dict(settings.get("text_cfg", {}))
    fields = open_clip.CLIPTextCfg.__dataclass_fields__
    for key in text:
        if key not in fields:
            raise KitError(unknown("open_clip text_cfg field", key, fields))
    causal = not text.get("no_causal_mask") and not text.get("embed_cls")
    own = not text.get("hf_model_name") and not text.get("hf_tokenizer_name")
    if not (causal and own) or text.get("pool_type", "argmax") not in ("argmax", "eos"):
        raise KitError(
            "this open_clip text tower is not a causal transformer over CLIP's own vocabulary; "
            "text encoder 'open_clip' reads only those, 'clip' and 't5' read transformers' towers"
        )
    # open_clip builds a text tower only as half of a model: its other half is the smallest there is.
    picture = {"layers": 1, "width": 8, "head_width": 8, "patch_size": 8, "image_size": 8}
    whole = open_clip.CustomTextCLIP(
        settings.get("embed_dim", 512), picture, text, bool(settings.get("quick_gelu"))
    )
    return whole.text


def _find(weights: str | Path, size: str | dict[str, Any] | None) -> tuple[Path, dict[str, Any]]:
    """The file with the tensors and the architecture they belong to."""
    text = str(weights)
    if (
        isinstance(weights, Path)
        or text.startswith((weights_path.PREFIX, "/", ".", "~"))
        or Path(text).exists()
    ):
        path = weights_path.resolve(weights)
        if path.is_file():
            if size is None:
                raise KitError(
                    f"weights {text!r} are one file; name their architecture with 'size', e.g. 'ViT-H-14'"
                )
            return path, _settings(size)
        file = next((path / name for name in _FILES if (path / name).is_file()), None)
        if file is None:
            raise KitError(f"weights {text!r} hold none of {', '.join(_FILES)}")
        return file, _settings(size) if size is not None else _read_config(path / "open_clip_config.json")
    if "/" in text:
        return _from_hub(text, size)
    return _from_tag(text, size)


def _read_config(file: Path) -> dict[str, Any]:
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
        return settings.get("model_cfg", settings)
    except FileNotFoundError:
        raise KitError(
            f"{file.parent} has no {file.name}; name the architecture with the option 'size'"
        ) from None
    except (ValueError, AttributeError) as error:
        raise KitError(f"{file} is not a JSON object: {error}") from error


def _from_hub(name: str, size: str | dict[str, Any] | None) -> tuple[Path, dict[str, Any]]:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    reason: Exception | None = None
    for file in _FILES:
        try:
            path = Path(hf_hub_download(name, file))
            if size is not None:
                return path, _settings(size)
            return path, _read_config(Path(hf_hub_download(name, "open_clip_config.json")))
        except LocalEntryNotFoundError as error:  # the hub cannot be reached: other names will not help
            reason = error
            break
        except EntryNotFoundError as error:
            reason = error
        except (OSError, ValueError) as error:
            reason = error
            break
    raise KitError(
        f"weights {name!r} are neither an existing path nor readable on the Hugging Face hub: "
        f"{first_line(reason)}"
    )


def _from_tag(tag: str, size: str | dict[str, Any] | None) -> tuple[Path, dict[str, Any]]:
    import open_clip

    if not isinstance(size, str):
        raise KitError(
            f"weights {tag!r} are no path; a pretrained tag needs the model's name in 'size', e.g. 'ViT-H-14'"
        )
    settings = _settings(size)
    pretrained = open_clip.get_pretrained_cfg(size, tag)
    if not pretrained:
        raise KitError(
            unknown(f"{size} tag", tag, ["random", *open_clip.list_pretrained_tags_by_model(size)])
        )
    try:
        file = open_clip.download_pretrained(pretrained)
    except Exception as error:  # network and hub libraries raise their own many kinds
        raise KitError(f"weights {size} {tag} cannot be downloaded: {first_line(error)}") from error
    return Path(file), {
        **settings,
        "quick_gelu": pretrained.get("quick_gelu", settings.get("quick_gelu", False)),
    }


def _text_tensors(file: Path) -> dict[str, Tensor]:
    """The text tower's tensors in either of open_clip's layouts (``text.`` prefix or top level)."""
    from safetensors import SafetensorError, safe_open

    try:
        if file.suffix == ".safetensors":
            with safe_open(file, framework="pt") as data:
                return {new: data.get_tensor(old) for old, new in _text_keys(data.keys()).items()}
        tensors = torch.load(file, map_location="cpu", weights_only=True)
    except SafetensorError as error:
        raise KitError(f"{file} is not a whole safetensors file: {error}") from error
    except Exception as error:  # torch.load: pickle, zip and RuntimeError alike
        raise KitError(f"{file} cannot be read as a checkpoint: {first_line(error)}") from error
    if not isinstance(tensors, dict):
        raise KitError(f"{file} holds a {type(tensors).__name__}, not a dictionary of tensors")
    tensors = tensors.get("state_dict", tensors)
    tensors = {key.removeprefix("module."): value for key, value in tensors.items()}
    return {new: tensors[old] for old, new in _text_keys(tensors).items()}


def _text_keys(keys: Iterable[str]) -> dict[str, str]:
    """Name in the file → name in the tower."""
    keys = list(keys)
    prefix = "text." if any(key.startswith("text.") for key in keys) else ""
    names = {key: key.removeprefix(prefix) for key in keys if key.startswith(prefix)}
    skip = ("visual.", "logit_scale", "logit_bias", "attn_mask")
    return {old: new for old, new in names.items() if not new.startswith(skip)}


def _load(network: nn.Module, tensors: dict[str, Tensor], source: str) -> None:
    own = network.state_dict()
    faults = [f"missing {key}" for key in own if key not in tensors]
    faults += [f"extra {key}" for key in tensors if key not in own]
    faults += [
        f"{key} is {tuple(tensors[key].shape)} instead of {tuple(own[key].shape)}"
        for key in own
        if key in tensors and tensors[key].shape != own[key].shape
    ]
    if faults:
        raise KitError(f"weights {source!r} do not fit the open_clip text tower: {shortened(faults)}")
    network.load_state_dict(tensors)
