"""How a stage's network is run: the choices, without the machinery."""

from __future__ import annotations

from dataclasses import dataclass, fields

from imagen_kit.errors import KitError, unknown

DTYPES = ("auto", "fp32", "bf16", "fp16")
MEMORY_FORMATS = ("auto", "channels_last", "contiguous")
COMPILES = ("off", "blocks", "whole")
QUANTISATIONS = ("off", "int8", "int8_weights", "fp8")
ATTENTIONS = ("sdpa", "flash", "cudnn", "efficient", "math", "flash3", "flex", "xformers", "eager")
CHOICES: dict[str, tuple[str, ...]] = {
    "dtype": DTYPES,
    "codec_dtype": DTYPES,
    "memory_format": MEMORY_FORMATS,
    "compile": COMPILES,
    "quantise": QUANTISATIONS,
    "attention": ATTENTIONS,
}


@dataclass(frozen=True, kw_only=True)
class Performance:
    """How a stage's network is run. None leaves a matter as it is: nothing is changed unasked.

    Attributes:
        dtype: ``fp32``, ``bf16``, ``fp16``, or ``auto``: what is fastest here without a visible loss.
        codec_dtype: of the decoder and encoder between pictures and latents, chosen as ``dtype``; ``auto``: as the
            network, but float32 in place of float16, in which published decoders overflow.
        memory_format: ``channels_last`` for convolutions, ``contiguous``, or ``auto``; goes with ``dtype: auto``
            unless it is said.
        compile: ``off``; ``blocks``: the repeated blocks, each kind once; ``whole``: the network as one graph.
        quantise: ``off``; ``int8``: weights and, at every call, activations; ``int8_weights``; ``fp8``.
        attention: kernel of the attention, see ``imagen_kit.attention``.
        prepack: hold weights as a CPU's products read them, see ``performance.prepacking``; without effect on other
            devices. Goes with ``dtype: auto`` unless it is said.
        graph: replay a whole sampling run as one CUDA graph; without effect on other devices.
        remember_text: compute once a run what the network makes of the text alone.

    Raises:
        KitError: a value that is none of these, or two that exclude each other.
    """

    dtype: str | None = None
    codec_dtype: str | None = None
    memory_format: str | None = None
    compile: str = "off"
    quantise: str = "off"
    attention: str | None = None
    prepack: bool | None = None
    graph: bool = False
    remember_text: bool = True

    def __post_init__(self) -> None:
        for name, choices in CHOICES.items():
            value = getattr(self, name)
            optional = next(field.default for field in fields(self) if field.name == name) is None
            if value not in choices and not (optional and value is None):
                raise KitError(unknown(f"performance {name}", value, choices))
        for name in ("prepack", "graph", "remember_text"):
            value = getattr(self, name)
            if not isinstance(value, bool) and (name, value) != ("prepack", None):
                raise KitError(f"performance {name} must be true or false, not {value!r}")
        if self.prepack and self.compile != "off":
            raise KitError(
                "performance prepack goes without compile, which arranges weights itself; choose one"
            )

    def words(self) -> str:
        """What differs from the defaults, as ``dtype bf16, compile blocks``; empty where nothing does."""
        spoken = [
            f"{field.name.replace('_', ' ')} {str(value).lower() if isinstance(value, bool) else value}"
            for field in fields(self)
            if (value := getattr(self, field.name)) != field.default
        ]
        return ", ".join(spoken)

    def brief(self) -> str:
        """How the network runs, as ``bf16 channels-last int8 flash compiled blocks graph``."""
        words = [self.dtype or "fp32", (self.memory_format or "").replace("_", "-")]
        words += ["packed" if self.prepack else ""]
        words += [self.quantise.replace("_", "-") if self.quantise != "off" else "", self.attention or ""]
        words.append("eager" if self.compile == "off" else f"compiled-{self.compile}")
        words.append("graph" if self.graph else "")
        words.append(f"decoder-{self.codec_dtype}" if self.codec_dtype not in (None, "fp32") else "")
        return " ".join(word for word in words if word and word != "contiguous")
