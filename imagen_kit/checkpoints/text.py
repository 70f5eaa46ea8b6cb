"""Text encoders: T5 and CLIP as transformers stores them, CLIP as open_clip does.

The settings that a model uses its encoder with (layer, padding, length) are a recipe's; an encoder loaded here has the
defaults of the kit's. Its tokenizer is the one beside the weights; without one, CLIP's vocabulary is known, and T5's
is not: such an encoder asks for one when it is given text.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

from imagen_kit.checkpoints.formats import Config, Format, Shapes, register
from imagen_kit.checkpoints.loading import TOKENIZER
from imagen_kit.checkpoints.rules import Ignore, Rename, Rule
from imagen_kit.errors import KitError
from imagen_kit.hollow import hollow_parameters

_BYTES = 384  # largest vocabulary of a byte tokenizer


def _configure_t5(shapes: Shapes, config: Config | None) -> dict[str, Any]:
    config = config or {}
    first = "encoder.block.0.layer."
    vocabulary, width = shapes["shared.weight"]
    buckets, heads = shapes[f"{first}0.SelfAttention.relative_attention_bias.weight"]
    gated = shapes.has(f"{first}1.DenseReluDense.wi_0.weight")
    hidden = shapes[f"{first}1.DenseReluDense.{'wi_0' if gated else 'wi'}.weight"][0]
    every = shapes.has("encoder.block.1.layer.0.SelfAttention.relative_attention_bias.weight")
    size = {
        "model_type": config.get("model_type", "umt5" if every else "t5"),
        "vocab_size": vocabulary,
        "d_model": width,
        "d_kv": shapes[f"{first}0.SelfAttention.q.weight"][0] // heads,
        "d_ff": hidden,
        "num_heads": heads,
        "num_layers": config.get("num_layers", shapes.count("encoder.block.{i}.{rest}")),
        "relative_attention_num_buckets": buckets,
        "relative_attention_max_distance": config.get("relative_attention_max_distance", 128),
        "layer_norm_epsilon": config.get("layer_norm_epsilon", 1e-6),
        "feed_forward_proj": config.get("feed_forward_proj", "gated-gelu" if gated else "relu"),
    }
    tokenizer = config.get(TOKENIZER) or ("bytes" if vocabulary <= _BYTES else "none")
    return {"weights": "random", "size": size, "tokenizer": tokenizer}


def _rules_t5(kwargs: Mapping[str, Any]) -> list[Rule]:
    return [
        Rename("shared.weight", "network.shared.weight"),
        Rename("encoder.{rest}", "network.encoder.{rest}"),
        Ignore("encoder.embed_tokens.weight"),  # the same table once more
        Ignore("decoder.{rest}"),
        Ignore("lm_head.weight"),
    ]


def _config_t5(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    return {**kwargs["size"], "is_encoder_decoder": False, "use_cache": False}


def _configure_clip(shapes: Shapes, config: Config | None) -> dict[str, Any]:
    whole = config or {}
    config = {**whole, **(whole.get("text_config") or {})}
    vocabulary, width = shapes["text_model.embeddings.token_embedding.weight"]
    projected = shapes.has("text_projection.weight")
    size = {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": shapes["text_model.encoder.layers.0.mlp.fc1.weight"][0],
        "num_hidden_layers": shapes.count("text_model.encoder.layers.{i}.{rest}"),
        "num_attention_heads": config.get("num_attention_heads", width // 64),
        "max_position_embeddings": shapes["text_model.embeddings.position_embedding.weight"][0],
        "hidden_act": config.get("hidden_act") or _activation(width),
        "layer_norm_eps": config.get("layer_norm_eps", 1e-5),
        "bos_token_id": vocabulary - 2,  # configs of published towers hold others, which nothing ever used
        "eos_token_id": vocabulary - 1,
        "projection_dim": shapes["text_projection.weight"][0]
        if projected
        else whole.get("projection_dim", width),
    }
    return {
        "weights": "random",
        "size": size,
        "tokenizer": config.get(TOKENIZER) or "auto",
        "pooled": "projection" if projected else "eos",
    }


def _activation(width: int) -> str:
    published = {512: "quick_gelu", 768: "quick_gelu", 1024: "gelu", 1280: "gelu"}
    if width not in published:
        raise KitError(
            f"width {width} is of no published CLIP, so its activation is unknown; give its config"
        )
    return published[width]


@cache
def _clip_prefix(projected: bool) -> str:
    """What transformers puts before the tower's names, which differs between its versions and classes."""
    import transformers as hf

    tiny: dict[str, Any] = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    kind = hf.CLIPTextModelWithProjection if projected else hf.CLIPTextModel
    with hollow_parameters():
        keys = kind(hf.CLIPTextConfig(**tiny, num_attention_heads=1)).state_dict()
    return "text_model." if any(key.startswith("text_model.") for key in keys) else ""


def _rules_clip(kwargs: Mapping[str, Any]) -> list[Rule]:
    projected = kwargs["pooled"] == "projection"
    return [
        Ignore("text_model.embeddings.position_ids"),
        Rename("text_model.{rest}", f"network.{_clip_prefix(projected)}{{rest}}"),
        Rename("text_projection.weight", "network.text_projection.weight"),
        Ignore("vision_model.{rest}"),
        Ignore("visual_projection.weight"),
        Ignore("logit_scale"),
    ]


def _config_clip(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    return {**kwargs["size"], "model_type": "clip_text_model"}


def _configure_open_clip(shapes: Shapes, config: Config | None) -> dict[str, Any]:
    config = config or {}
    config = config.get("model_cfg", config)
    vocabulary, width = shapes["token_embedding.weight"]
    if "text_cfg" not in config and width not in (1024, 1280):
        raise KitError(
            f"width {width} is not that of ViT-H or ViT-bigG, so its activation is unknown; give its config"
        )
    text = {
        **(config.get("text_cfg") or {}),
        "context_length": shapes["positional_embedding"][0],
        "vocab_size": vocabulary,
        "width": width,
        "layers": shapes.count("transformer.resblocks.{i}.{rest}"),
    }
    text.setdefault("heads", width // 64)
    size = {
        "embed_dim": shapes["text_projection"][1],
        "text_cfg": text,
        "quick_gelu": bool(config.get("quick_gelu", False)),
    }
    return {"weights": "random", "size": size}


def _rules_open_clip(kwargs: Mapping[str, Any]) -> list[Rule]:
    return [
        Ignore("visual.{rest}"),
        Ignore("logit_scale"),
        Ignore("logit_bias"),
        Ignore("attn_mask"),
        Rename("{rest}", "network.{rest}"),
    ]


register(
    Format(
        "t5_transformers",
        "text_encoder",
        "t5",
        "diffusers",
        _configure_t5,
        _rules_t5,
        _config_t5,
        has=("encoder.block.{i}.layer.{j}.SelfAttention.q.weight", "encoder.final_layer_norm.weight"),
        classes=("T5EncoderModel", "T5ForConditionalGeneration", "MT5EncoderModel", "UMT5EncoderModel"),
        prefixes=("", "text_encoders.t5xxl.transformer."),
        aliases=(("encoder.embed_tokens.weight", "shared.weight"),),
    )
)
register(
    Format(
        "clip_transformers",
        "text_encoder",
        "clip",
        "diffusers",
        _configure_clip,
        _rules_clip,
        _config_clip,
        has=(
            "text_model.encoder.layers.{i}.self_attn.q_proj.weight",
            "text_model.embeddings.position_embedding.weight",
            "text_model.final_layer_norm.weight",
        ),
        classes=("CLIPTextModel", "CLIPTextModelWithProjection", "CLIPModel"),
        prefixes=(
            "",
            "cond_stage_model.transformer.",
            "conditioner.embedders.0.transformer.",
            "text_encoders.clip_l.transformer.",
            "text_encoders.clip_g.transformer.",
        ),
        aliases=tuple(  # transformers 5 writes towers without projection so
            (f"{part}.{{rest}}", f"text_model.{part}.{{rest}}")
            for part in ("embeddings", "encoder", "final_layer_norm")
        ),
    )
)
register(
    Format(
        "clip_open_clip",
        "text_encoder",
        "open_clip",
        "official",
        _configure_open_clip,
        _rules_open_clip,
        has=("transformer.resblocks.{i}.attn.in_proj_weight", "token_embedding.weight", "text_projection"),
        prefixes=("", "cond_stage_model.model.", "conditioner.embedders.1.model."),
        aliases=(("text.{rest}", "{rest}"),),
    )
)
