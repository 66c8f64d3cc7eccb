"""Stand-ins for vembed's retrieval model and for what opens its checkpoints: the same modules under the same names, the same files
opened in the same order, none of its code.

vembed/model/modeling.py (facade), backbones/{auto,vlm_generic,composed,qwen3_embedding}.py, inference.py, entrypoints/evaluate.py,
benchmark/model_wrapper.py.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers import AutoModel, AutoProcessor, AutoTokenizer


class Auto(nn.Module):
    """Encoders: the first token, projected. The head's weights lie beside the model's as a pickle, keys without prefix."""

    has_head = True

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        where = Path(config["model_name_or_path"])
        self.backbone: Any = AutoModel.from_pretrained(where)
        if (where / "adapter_config.json").exists():
            self.backbone = PeftModel.from_pretrained(self.backbone, where).merge_and_unload()
        hidden = self.backbone.config.hidden_size
        self.topk_tokens = int(config.get("topk_tokens", 0))
        self.projection_head = None
        if self.has_head and config.get("projection_dim"):
            self.projection_head = nn.Linear(hidden, config["projection_dim"], bias=False)
            if (where / "projection_head.pt").is_file():
                self.projection_head.load_state_dict(torch.load(where / "projection_head.pt", weights_only=True))

    def pool(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden[:, 0]

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        pooled = self.pool(self.backbone(input_ids=input_ids).last_hidden_state)
        return pooled if self.projection_head is None else self.projection_head(pooled)

    def save_pretrained(self, directory: str) -> None:
        self.backbone.save_pretrained(directory)
        if self.projection_head is not None:
            torch.save(self.projection_head.state_dict(), Path(directory) / "projection_head.pt")


class Causal(Auto):
    """vlm_generic: decoders, the last token."""

    def pool(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden[:, -1]


class Qwen3(Causal):
    """qwen3_embedding and qwen3_vl: no head."""

    has_head = False


class Encoder(nn.Module):
    def __init__(self, name: str) -> None:
        super().__init__()
        self.model = AutoModel.from_pretrained(name)


class Composed(nn.Module):
    """Two encoders in directories of their own, two heads as pickles."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        self.text_encoder = Encoder(config["text_model_name"])
        self.image_encoder = Encoder(config["image_model_name"])
        for kind in ("text", "image"):
            hidden = getattr(self, f"{kind}_encoder").model.config.hidden_size
            head = nn.Sequential(
                nn.Linear(hidden, hidden), nn.GELU(), nn.Linear(hidden, config["projection_dim"], bias=False)
            )
            setattr(self, f"{kind}_projection", head)
            saved = Path(config["model_name_or_path"]) / f"{kind}_projection.pt"
            if saved.is_file():
                head.load_state_dict(torch.load(saved, weights_only=True))

    def forward(self, input_ids: Any = None, pixel_values: Any = None) -> torch.Tensor:
        if pixel_values is None:
            return self.text_projection(self.text_encoder.model(input_ids=input_ids).last_hidden_state.mean(1))
        return self.image_projection(self.image_encoder.model(pixel_values=pixel_values).last_hidden_state[:, 0])

    def save_pretrained(self, directory: str) -> None:
        for kind in ("text", "image"):
            getattr(self, f"{kind}_encoder").model.save_pretrained(Path(directory) / f"{kind}_encoder")
            torch.save(getattr(self, f"{kind}_projection").state_dict(), Path(directory) / f"{kind}_projection.pt")


BACKENDS = {"auto": Auto, "vlm_generic": Causal, "qwen3_embedding": Qwen3, "composed": Composed}


class RetrievalModel(nn.Module):
    """The facade: a plain module whose `save_pretrained` takes a directory and nothing else."""

    def __init__(self, model_name_or_path: str, encoder_mode: str = "auto", **options: Any) -> None:
        super().__init__()
        self.backend: Any = BACKENDS[encoder_mode]({"model_name_or_path": model_name_or_path, **options})

    def forward(self, **inputs: torch.Tensor) -> torch.Tensor:
        return self.backend(**inputs)

    def save_pretrained(self, directory: str) -> None:
        self.backend.save_pretrained(directory)


# -- what opens a checkpoint

_MODEL_KEYS = ("projection_dim", "topk_tokens", "use_mrl", "mrl_dims")


def _config(path: Path) -> dict[str, Any]:
    file = path / "vembed_config.json"
    return json.loads(file.read_text()) if file.exists() else {}


def predictor(path: Path, **options: Any) -> tuple[RetrievalModel, Any]:
    """inference.py: four keys of the config, the model, then its processor; for composed models the tokenizer."""
    config = _config(path)
    model = RetrievalModel(str(path), **options, **{key: config[key] for key in _MODEL_KEYS if key in config})
    if options.get("encoder_mode") == "composed":
        return model.eval(), AutoTokenizer.from_pretrained(path)
    return model.eval(), AutoProcessor.from_pretrained(path)


def evaluate(path: Path, **options: Any) -> tuple[RetrievalModel, Any]:
    """entrypoints/evaluate.py: the encoder's mode from the config too; the processor if there is one."""
    config = _config(path)
    options = {"encoder_mode": config["encoder_mode"], **options}
    model = RetrievalModel(str(path), **options, **{key: config[key] for key in (*_MODEL_KEYS, "pooling_method")})
    try:
        return model.eval(), AutoProcessor.from_pretrained(path)
    except (ValueError, KeyError, ImportError, OSError):
        return model.eval(), None


def benchmark(path: Path, **options: Any) -> tuple[RetrievalModel, Any]:
    """benchmark/model_wrapper.py: no config at all; the mode from the name of the path."""
    mode = "qwen3_embedding" if "qwen3_embedding" in str(path).lower() else "auto"
    return RetrievalModel(str(path), **{"encoder_mode": mode, **options}).eval(), AutoProcessor.from_pretrained(path)
