"""Whatever opens a checkpoint of vembed opens ours: with the files it knows and no others, and it computes what the trained model
computes."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from tokenizers import Tokenizer, models
from transformers import (
    AutoModel,
    BertConfig,
    BertModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3Model,
    ViTConfig,
    ViTModel,
)

from vembed_async_ckpt import AsyncCheckpointer, CheckpointInfo, PlanError, load, save_checkpoint, verify
from vembed_async_ckpt.integrations.accelerate import attach

from .retrievers import RetrievalModel, benchmark, evaluate, predictor

pytestmark = [
    # Raised between PEFT and transformers, not by a call of ours.
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),
    # transformers has applied the adapter when vembed applies it again: vembed's own way of reading.
    pytest.mark.filterwarnings("ignore:Already found a .peft_config. attribute:UserWarning"),
]

Reader = Callable[..., tuple[RetrievalModel, Any]]

IDS = torch.tensor([[1, 4, 4, 2], [1, 3, 0, 2]])
PIXELS = torch.linspace(-1, 1, 2 * 3 * 8 * 8).reshape(2, 3, 8, 8)
SMALL = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The models that trainings begin with, on disk."""
    torch.manual_seed(0)
    kinds = {
        "bert": BertModel(BertConfig(**SMALL, vocab_size=40)),
        "qwen3": Qwen3Model(Qwen3Config(**SMALL, vocab_size=40, num_key_value_heads=1, head_dim=8)),
        "vit": ViTModel(ViTConfig(**SMALL, image_size=8, patch_size=4)),
    }
    directory = tmp_path_factory.mktemp("bases")
    for name, model in kinds.items():
        model.save_pretrained(directory / name)
    return {name: str(directory / name) for name in kinds}


def tokenizer() -> PreTrainedTokenizerFast:
    words = {word: number for number, word in enumerate(("[UNK]", "[CLS]", "[SEP]", "[PAD]", "hello"))}
    backend = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]", pad_token="[PAD]")


def trained(model: RetrievalModel, **inputs: torch.Tensor) -> tuple[Accelerator, Any]:
    """One step away from the base, prepared."""
    accelerator = Accelerator(cpu=True)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model, optimizer = accelerator.prepare(model, optimizer)
    accelerator.backward(sum(model(**{name: value}).pow(2).mean() for name, value in inputs.items()))
    optimizer.step()
    return accelerator, model.eval()


def with_adapter(model: RetrievalModel) -> RetrievalModel:
    """LoRA on the backbone, of which also the second matrix is not zero."""
    kind = LoraConfig(r=2, target_modules=["query", "value", "q_proj", "v_proj"], init_lora_weights=False)
    model.backend.backbone = get_peft_model(model.backend.backbone, kind)
    return model


def saved(root: Path, name: str, model: Any, accelerator: Accelerator, config: dict[str, Any]) -> CheckpointInfo:
    info = save_checkpoint(root / name, model, accelerator, processor=tokenizer(), config=config).result(60)
    verify(info.path)
    return info


def only(path: Path, *files: str) -> Path:
    """A directory of the same name with nothing in it but these files; a name that ends with / is a directory."""
    target = path.parent.parent / "opened" / path.name
    for file in files:
        found = [entry.relative_to(path) for entry in (path / file).glob("*")] if file.endswith("/") else [Path(file)]
        for name in found:
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            os.link(path / name, target / name)
    return target


WORDS = ("tokenizer.json", "tokenizer_config.json", "vembed_config.json")
READERS: tuple[Reader, ...] = (predictor, evaluate, benchmark)


@pytest.mark.parametrize("projection", [None, 8], ids=["no head", "head"])
@pytest.mark.parametrize(("mode", "base"), [("auto", "bert"), ("vlm_generic", "qwen3"), ("qwen3_embedding", "qwen3")])
def test_a_full_fine_tune_is_opened(
    root: Path, bases: dict[str, str], mode: str, base: str, projection: int | None
) -> None:
    """config.json, model.safetensors, tokenizer, vembed_config.json and, where there is one, projection_head.pt."""
    options = {"encoder_mode": mode, "projection_dim": projection}
    accelerator, model = trained(RetrievalModel(bases[base], **options), input_ids=IDS)
    info = saved(root, f"{mode}-checkpoint-step-1", model, accelerator, {**options, "topk_tokens": None})
    has_head = projection is not None and mode != "qwen3_embedding"
    files = ["config.json", "model.safetensors", *WORDS, *(["projection_head.pt"] if has_head else [])]
    path = only(info.path, *files)
    for reader in READERS:
        given = options if reader is benchmark else {"encoder_mode": mode}
        opened, processor = reader(path, **given)
        assert torch.equal(opened(input_ids=IDS), model(input_ids=IDS)), reader
        assert processor("hello")["input_ids"] == [4]


@pytest.mark.parametrize(("mode", "base"), [("auto", "bert"), ("vlm_generic", "qwen3"), ("qwen3_embedding", "qwen3")])
def test_an_adapter_is_opened(root: Path, bases: dict[str, str], mode: str, base: str) -> None:
    """adapter_config.json and adapter_model.safetensors on the base that they name; merged it computes the same."""
    options = {"encoder_mode": mode, "projection_dim": 8}
    accelerator, model = trained(with_adapter(RetrievalModel(bases[base], **options)), input_ids=IDS)
    info = saved(root, f"{mode}-checkpoint-step-1", model, accelerator, options)
    files = ["adapter_config.json", "adapter_model.safetensors", *WORDS]
    files += [] if mode == "qwen3_embedding" else ["projection_head.pt"]
    path = only(info.path, *files)
    for reader in READERS:
        given = options if reader is benchmark else {"encoder_mode": mode}
        opened, processor = reader(path, **given)
        torch.testing.assert_close(opened(input_ids=IDS), model(input_ids=IDS))
        assert processor("hello")["input_ids"] == [4]
    untrained = RetrievalModel(bases[base], **options).eval()
    assert not torch.allclose(untrained(input_ids=IDS), model(input_ids=IDS))


def test_the_base_of_an_adapter_is_not_written(root: Path, bases: dict[str, str]) -> None:
    """No model.safetensors and no config.json; the head, which the adapter's files do not hold, is saved for our load too."""
    accelerator, model = trained(with_adapter(RetrievalModel(bases["bert"], projection_dim=8)), input_ids=IDS)
    info = saved(root, "checkpoint-step-1", model, accelerator, {})
    assert not {"model.safetensors", "config.json"} & info.files.keys()
    names = set()
    for file in ("adapter_model.safetensors", "vembed_uncovered.safetensors"):
        names |= set(load_file(info.path / file))
    trainable = {name.replace(".default", "") for name, p in model.named_parameters() if p.requires_grad}
    assert {name.removeprefix("backend.backbone.") for name in names} == {
        name.removeprefix("backend.backbone.") for name in trainable
    }


@pytest.mark.parametrize("attached", [True, False], ids=["attached", "stock"])
def test_the_base_is_written_on_request(root: Path, bases: dict[str, str], attached: bool) -> None:
    """With base_model=True `accelerator.load_state` needs no help, and whoever opens adapters opens them as before."""
    accelerator, model = trained(with_adapter(RetrievalModel(bases["bert"], projection_dim=8)), input_ids=IDS)
    expected = {name: value.clone() for name, value in model.state_dict().items()}
    handle = save_checkpoint(
        root / "checkpoint-step-1", model, accelerator, tokenizer(), {"projection_dim": 8}, base_model=True
    )
    path = handle.result(60).path
    for parameter in model.parameters():
        torch.nn.init.zeros_(parameter)
    if attached:
        attach(accelerator)
    accelerator.load_state(str(path))
    for name, value in model.state_dict().items():
        frozen = attached and not name.startswith("backend.projection_head") and "lora" not in name
        assert torch.equal(value, torch.zeros_like(value) if frozen else expected[name]), name
    accelerator.load_state(str(path)) if not attached else load(path, model=model)
    model.load_state_dict(expected)
    torch.testing.assert_close(predictor(path)[0](input_ids=IDS), model(input_ids=IDS))


def test_the_base_has_no_place_beside_a_whole_model(root: Path, bases: dict[str, str]) -> None:
    """save_pretrained writes model.safetensors itself: asking for it twice is refused, and what to do instead is said."""
    accelerator, model = trained(RetrievalModel(bases["bert"]), input_ids=IDS)
    with pytest.raises(PlanError, match="attach"):
        save_checkpoint(root / "checkpoint-step-1", model, accelerator, base_model=True)


def test_two_encoders_are_opened(root: Path, bases: dict[str, str]) -> None:
    """text_encoder/ and image_encoder/ as directories that from_pretrained opens, the two heads as pickles."""
    options = {"encoder_mode": "composed", "projection_dim": 8}
    model = RetrievalModel("", text_model_name=bases["bert"], image_model_name=bases["vit"], **options)
    accelerator, model = trained(model, input_ids=IDS, pixel_values=PIXELS)
    with pytest.warns(UserWarning, match="model_state_dict.safetensors was left out"):
        info = saved(root, "checkpoint-step-1", model, accelerator, options)
    files = ("text_encoder/", "image_encoder/", "text_projection.pt", "image_projection.pt", *WORDS)
    path = only(info.path, *files)
    encoders = {"text_model_name": str(path / "text_encoder"), "image_model_name": str(path / "image_encoder")}
    for reader in (predictor, evaluate):
        opened, _ = reader(path, encoder_mode="composed", **encoders)
        assert torch.equal(opened(input_ids=IDS), model(input_ids=IDS)), reader
        assert torch.equal(opened(pixel_values=PIXELS), model(pixel_values=PIXELS)), reader


@pytest.mark.parametrize("kind", ["full", "adapter", "composed"])
def test_each_of_them_resumes(root: Path, bases: dict[str, str], kind: str) -> None:
    """Where the original's full fine-tune could not be resumed at all: every tensor of the wrapped model comes back."""

    def fresh() -> RetrievalModel:
        if kind == "composed":
            names = {"text_model_name": bases["bert"], "image_model_name": bases["vit"]}
            return RetrievalModel("", encoder_mode="composed", projection_dim=8, **names)
        model = RetrievalModel(bases["bert"], projection_dim=8)
        return with_adapter(model) if kind == "adapter" else model

    inputs = {"input_ids": IDS, "pixel_values": PIXELS} if kind == "composed" else {"input_ids": IDS}
    accelerator, model = trained(fresh(), **inputs)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "model_state_dict.safetensors was left out")
        info = saved(root, "checkpoint-step-1", model, accelerator, {})
    for reader in ("ours", "attached"):
        again, other = trained(fresh(), **inputs)
        assert any(not torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
        if reader == "ours":
            load(info.path, accelerator=again)
        else:
            attach(again)
            again.load_state(str(info.path))
        for name, value in other.state_dict().items():
            assert torch.equal(value, model.state_dict()[name]), (reader, name)


def test_a_processor_that_wraps_another_is_saved(root: Path, bases: dict[str, str]) -> None:
    """As vembed's for SigLIP: `save_pretrained` comes through `__getattr__`."""

    class Wrapper:
        def __init__(self, processor: Any) -> None:
            self.processor = processor

        def __getattr__(self, name: str) -> Any:
            if name == "processor":
                raise AttributeError
            return getattr(self.processor, name)

    accelerator, model = trained(RetrievalModel(bases["bert"]), input_ids=IDS)
    handle = save_checkpoint(root / "siglip-checkpoint-step-1", model, accelerator, processor=Wrapper(tokenizer()))
    assert {"tokenizer.json", "tokenizer_config.json"} < handle.result(60).files.keys()


def test_shards_are_opened(root: Path, bases: dict[str, str]) -> None:
    """index and shards, through a checkpointer of one's own that makes them small. (vembed's facade passes no size on: its own
    backbones are in one file up to 50 GB.)"""
    accelerator, model = Accelerator(cpu=True), AutoModel.from_pretrained(bases["bert"])
    model = accelerator.prepare(model)
    with AsyncCheckpointer(root, max_shard_size="4KB") as checkpointer, pytest.warns(UserWarning, match="left out"):
        path = (
            save_checkpoint(root / "checkpoint-step-1", model, accelerator, checkpointer=checkpointer).result(60).path
        )
    assert (path / "model.safetensors.index.json").exists()
    expected = model.state_dict()
    opened = AutoModel.from_pretrained(path).state_dict()
    assert all(torch.equal(opened[name], value) for name, value in expected.items())
