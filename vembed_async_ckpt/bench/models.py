"""Models of the user's own: read by transformers, and trained on random input where one can be guessed."""

from __future__ import annotations

import os
from typing import Any

import torch

from .options import Refused


def pretrained(name: str, *, empty: bool = False) -> torch.nn.Module:
    """The model behind a config.json, a directory or a hub id; weights are random when there are none. `empty`: without
    memory for weights, to be counted. Raises `Refused` for what transformers cannot read."""
    import transformers

    try:
        config = transformers.AutoConfig.from_pretrained(name)
        kind = (
            getattr(transformers, (getattr(config, "architectures", None) or [""])[0], None) or transformers.AutoModel
        )
        bare = kind.from_config if kind is transformers.AutoModel else kind._from_config
        if empty:
            with torch.device("meta"):
                model = bare(config)
        elif os.path.isfile(name) or (os.path.isdir(name) and not _has_weights(name)):
            model = bare(config)
        else:
            model = kind.from_pretrained(name)
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise Refused(f"--model {name}: {str(error).strip().splitlines()[0]}") from error
    return model.float().train()  # type: ignore[no-any-return]


def _has_weights(directory: str) -> bool:
    return any(name.endswith((".safetensors", ".bin", ".index.json")) for name in os.listdir(directory))


def guess_inputs(model: Any, batch: int) -> dict[str, torch.Tensor] | None:
    """Random token ids or pixels that this model's forward pass takes, or None."""
    config, device = model.config, next(model.parameters()).device
    text = getattr(config, "text_config", config)
    vision = getattr(config, "vision_config", config)
    length = min(64, getattr(text, "max_position_embeddings", None) or 64)
    ids = torch.randint(0, max(2, getattr(text, "vocab_size", None) or 2), (batch, length), device=device)
    side = getattr(vision, "image_size", None) or 224
    rows, columns = side if isinstance(side, list | tuple) else (side, side)
    pixels = torch.rand(batch, getattr(vision, "num_channels", None) or 3, rows, columns, device=device)
    for inputs in (
        {"input_ids": ids},
        {"pixel_values": pixels},
        {"input_ids": ids, "decoder_input_ids": ids},
        {"input_ids": ids, "pixel_values": pixels},
    ):
        try:
            loss_of(model(**inputs)).backward()  # type: ignore[no-untyped-call]
        except Exception:
            continue  # not what this model takes
        finally:
            model.zero_grad()
        return inputs
    return None


def loss_of(output: Any) -> torch.Tensor:
    values = output.values() if hasattr(output, "values") else output if isinstance(output, tuple) else [output]
    for value in values:
        if isinstance(value, torch.Tensor) and value.is_floating_point() and value.requires_grad:
            return value.pow(2).mean()
    raise ValueError("no output to train on")
