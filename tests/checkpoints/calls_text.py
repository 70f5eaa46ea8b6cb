"""How fixtures of text encoders are run: on token ids, through the network that an encoder holds."""

from __future__ import annotations

import torch


def t5(module, inputs, config, meta):
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    blocks = module._blocks(ids, mask.bool())
    return {
        "last_hidden_state": module.network(ids, mask.bool()),
        "last_hidden_state_nomask": module.network(ids),
        **{f"hidden_states.{k}": block for k, block in enumerate(blocks)},
    }


def clip(module, inputs, config, meta):
    ids = inputs["input_ids"]
    ends = (ids == ids.max(1, keepdim=True).values).int().argmax(1)  # the first position of the highest id
    tokens, pooled = module._run(ids, torch.ones_like(ids, dtype=torch.bool), ends)
    masked, _ = module._run(ids, inputs["attention_mask"].bool(), ends)
    return {
        "last_hidden_state": tokens,
        "last_hidden_state_masked": masked,
        "text_embeds" if module.pooled == "projection" else "pooler_output": pooled,
        **{f"hidden_states.{k}": block for k, block in enumerate(module._blocks(ids, torch.ones_like(ids)))},
    }


def open_clip(module, inputs, config, meta):
    ids = inputs["text"]
    ends, mask = ids.argmax(1), torch.ones_like(ids, dtype=torch.bool)
    tokens, pooled = module._run(ids, mask, ends)
    blocks = module._blocks(ids, mask)
    return {
        "encode_text": pooled,
        "encode_text_normalized": torch.nn.functional.normalize(pooled, dim=-1),
        "last_ln_final": tokens,
        "penultimate_ln_final": module.network.ln_final(blocks[-2]),
        **{f"resblocks.{k}": block for k, block in enumerate(blocks[1:])},
    }


CALLS = {"t5_transformers": t5, "clip_transformers": clip, "clip_open_clip": open_clip}
