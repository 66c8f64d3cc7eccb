"""A directory of ours is the one `save_pretrained` writes, for every family; and it brings every model back."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf

from vembed_async_ckpt import CheckpointError, load
from vembed_async_ckpt._format import names

from .architectures import ARCHITECTURES, EXPERT_MODELS, build
from .checks import BOUND, differing, files, state, stock, ties
from .conftest import Saver

POSITIONS = ["model.decoder.embed_positions.weight", "model.encoder.embed_positions.weight"]
NOT_SAVED = {"Marian, tied": POSITIONS}  # save_pretrained leaves its sinusoids out
MADE_ANEW = {
    "ChineseCLIP": ["text_model.embeddings.word_embeddings.weight"]
}  # by from_pretrained, in the padding's row


def described(path: Path) -> Any:
    """What the manifest keeps of the one model in a checkpoint."""
    return json.loads((path / names.MANIFEST).read_bytes())["names"][""]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_family(saver: Saver, tmp_path: Path, name: str):
    """Same files with the same bytes, learned and replayed; `from_pretrained` and `load` give the model of the call."""
    model = build(name)
    for turn in ("learned", "replayed"):
        expected, saved = stock(model, tmp_path / turn), state(model)
        path = saver.save(model)
        assert files(path) == expected, turn
    assert differing(state(model), saved), "the weights changed after the call"
    left_out = NOT_SAVED.get(name, [])
    assert differing(type(model).from_pretrained(path).state_dict(), saved) == MADE_ANEW.get(name, left_out)
    fresh = build(name, seed=12)
    load(path, model=fresh)
    assert differing(state(fresh), saved) == left_out
    assert ties(fresh) == ties(model)
    assert bool(described(path)["ties"]) == ("tied" in name)
    assert any(part for file in described(path)["renamed"].values() for _, part in file.values()) == ("parts" in name)


SHARDED = [
    "Bert", "GPT2, tied", "T5, tied", "CLIP", "LLaVA, renamed", "Wav2Vec2", "Mamba, tied", "Switch, tied", "GPT-OSS", "Llama4",
    *(name for name in EXPERT_MODELS if "parts" in name),
]  # fmt: skip


@pytest.mark.parametrize("name", SHARDED)
def test_shards(sharding_saver: Saver, tmp_path: Path, name: str):
    """Beyond max_shard_size: the shards and the index that save_pretrained writes, and a model that comes back from them."""
    model = build(name)
    for turn in ("learned", "replayed"):
        expected, saved = stock(model, tmp_path / turn, max_shard_size="10KB"), state(model)
        assert "model.safetensors.index.json" in expected
        assert len([file for file in expected if file.endswith(".safetensors")]) > 1
        path = sharding_saver.save(model)
        assert files(path) == expected, turn
    fresh = build(name, seed=12)
    load(path, model=fresh)
    assert differing(state(fresh), saved) == []
    assert ties(fresh) == ties(model)


CONVERTED = [
    "LLaVA, renamed",
    "LLaVA-NeXT, renamed",
    "CLIP",
    "DINOv2",
    "T5, tied",
    "Gemma3 with images, tied",
    *EXPERT_MODELS,
]


@pytest.mark.parametrize("name", CONVERTED)
def test_without_the_original_format(plain_saver: Saver, tmp_path: Path, name: str):
    """`save_original_format=False` means what it means to save_pretrained."""
    model = build(name)
    for turn in ("learned", "replayed"):
        expected, saved = stock(model, tmp_path / turn, save_original_format=False), state(model)
        path = plain_saver.save(model)
        assert files(path) == expected, turn
    assert described(path)["renamed"] == {}
    fresh = build(name, seed=12)
    load(path, model=fresh)
    assert differing(state(fresh), saved) == []


def half(model: Any) -> None:
    model.to(torch.float16)


def brain(model: Any) -> None:
    model.to(torch.bfloat16)


def double(model: Any) -> None:
    model.to(torch.float64)


def mixed(model: Any) -> None:
    """Matrices in bfloat16, the rest in float32 with all its bits, as many train."""
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data = parameter.data.to(torch.bfloat16)
        else:
            parameter.data.add_(torch.randn_like(parameter))


def turned(model: Any) -> None:
    """Every matrix with the strides of its transpose."""
    for parameter in model.parameters():
        if parameter.ndim == 2:
            parameter.data = parameter.data.t().contiguous().t()


SHAPED = ["Bert", "GPT2, tied", "T5, tied", "CLIP", "LLaVA, renamed", "ResNet", "Mixtral, parts", "GPT-OSS", "Mamba2"]


CONVERSIONS = [
    (name, convert)
    for name in SHAPED
    for convert in (half, brain, double, mixed, turned)
    if not (convert is turned and "tied" in name)  # save_pretrained itself cannot
]


@pytest.mark.parametrize(
    ("name", "convert"), CONVERSIONS, ids=[f"{name}, {convert.__name__}" for name, convert in CONVERSIONS]
)
def test_dtypes_and_strides(saver: Saver, tmp_path: Path, name: str, convert: Callable[[Any], None]):
    """Of whatever dtype and strides, also of a model that was known as another one; and into one, and out of it again."""
    model = build(name)
    saver.save(model)
    convert(model)
    for turn in ("learned", "replayed"):
        expected, saved = stock(model, tmp_path / turn), state(model)
        path = saver.save(model)
        assert files(path) == expected, turn
    fresh = build(name, seed=12)
    if convert is not turned:
        convert(fresh)
    load(path, model=fresh)
    assert differing(state(fresh), saved) == []


@pytest.mark.parametrize("name", ["Mixtral, parts", "Qwen3-MoE, parts", "Jamba, parts"])
def test_values_that_saving_computed_come_back_in_mixed_dtypes(sharding_saver: Saver, name: str):
    """Shards of experts are computed by the save and back by `from_pretrained`, which knows one dtype only: the widest."""
    model, fresh = build(name), build(name, seed=12)
    mixed(model)
    mixed(fresh)
    saved = state(model)
    path = sharding_saver.save(model)
    assert described(path)["computed"]
    random = torch.get_rng_state()
    load(path, model=fresh)
    assert differing(state(fresh), saved) == []
    assert torch.equal(torch.get_rng_state(), random), "a model alone does not touch the random states"


# -- ties that come and go

TIED = ["Bert for masks, tied", "GPT2, tied", "Qwen3, tied", "BART, tied", "PaliGemma, tied", "Mamba, tied"]


def untie(model: Any) -> None:
    head = model.get_output_embeddings()
    head.weight = torch.nn.Parameter(head.weight.detach().clone() + 1)
    model.config.tie_word_embeddings = False


@pytest.mark.parametrize("name", TIED)
def test_a_tie_that_parts(saver: Saver, tmp_path: Path, name: str):
    """After untying both weights are stored, and both come back; tied again there is one."""
    model = build(name)
    first = saver.save(model)
    tied, once = state(model), described(first)["ties"]
    untie(model)
    expected, parted = stock(model, tmp_path / "parted"), state(model)
    second = saver.save(model)
    assert files(second) == expected
    assert len(described(second)["ties"]) < len(once)
    fresh = build(name, seed=12)
    untie(fresh)
    load(second, model=fresh)
    assert differing(state(fresh), parted) == []
    head = model.get_output_embeddings()
    head.weight = model.get_input_embeddings().weight
    model.config.tie_word_embeddings = True
    expected = stock(model, tmp_path / "tied")
    third = saver.save(model)
    assert files(third) == expected
    assert described(third)["ties"].keys() == once.keys()
    assert tied.keys() == state(model).keys()


@pytest.mark.parametrize("name", TIED)
def test_a_tied_model_into_an_untied_one_and_back(saver: Saver, name: str):
    """The one value goes to both places; two values do not go into one place, and then nothing is changed."""
    tied, untied = build(name), build(name, seed=12)
    untie(untied)
    saved, apart = state(tied), state(untied)
    path = saver.save(tied)
    load(path, model=untied)
    assert differing(state(untied), saved) == []
    untied.load_state_dict(apart)
    path, before = saver.save(untied), state(tied)
    with pytest.raises(CheckpointError, match="share memory, but were saved with different values"):
        load(path, model=tied)
    assert differing(state(tied), before) == []


# -- while training goes on


@pytest.mark.parametrize("name", ["Bert", "Qwen3, tied", "T5, tied", "CLIP", "Mixtral, parts", "LLaVA, renamed"])
def test_an_optimizer_that_steps_right_after_the_call(saver: Saver, tmp_path: Path, name: str):
    """What is copied beside the training (the optimizer waits for it) is what save_pretrained would have written."""
    model = build(name)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for turn in ("first", "second", "third"):
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        expected, saved = stock(model, tmp_path / turn), state(model)
        handle = saver.checkpointer.save(next(saver.steps), model=model, optimizer=optimizer)
        optimizer.step()
        path = handle.result(BOUND).path
        assert files(path) == expected, turn
    assert differing(state(model), saved)
    fresh = build(name, seed=12)
    load(path, model=fresh)
    assert differing(state(fresh), saved) == []


# -- code that comes with the model

CODE = """
import torch
from transformers import PretrainedConfig, PreTrainedModel
from .layers import Layer

class TinyConfig(PretrainedConfig):
    model_type = "tiny-of-tests"
    def __init__(self, width=8, **kwargs):
        super().__init__(**kwargs)
        self.width = width

class TinyModel(PreTrainedModel):
    config_class = TinyConfig
    def __init__(self, config):
        super().__init__(config)
        self.layer = Layer(config.width)
        self.post_init()
    def _init_weights(self, module):
        pass
    def forward(self, x):
        return self.layer(x)
"""
LAYERS = """
import torch

class Layer(torch.nn.Linear):
    def __init__(self, width):
        super().__init__(width, width)
        self.register_buffer("seen", torch.zeros(()))
"""


def test_code_that_comes_with_the_model(saver: Saver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A model of remote code is saved with its code files, and from them it is opened again."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    origin = tmp_path / "origin"
    origin.mkdir()
    (origin / "tiny.py").write_text(CODE)
    (origin / "layers.py").write_text(LAYERS)
    auto = {"AutoConfig": "tiny.TinyConfig", "AutoModel": "tiny.TinyModel"}
    (origin / "config.json").write_text(json.dumps({"model_type": "tiny-of-tests", "width": 8, "auto_map": auto}))
    config = hf.AutoConfig.from_pretrained(origin, trust_remote_code=True)
    model = hf.AutoModel.from_config(config, trust_remote_code=True)
    for turn in ("learned", "replayed"):
        expected, saved = stock(model, tmp_path / turn), state(model)
        assert {"tiny.py", "layers.py", "config.json", "model.safetensors"} == set(expected)
        path = saver.save(model)
        assert files(path) == expected, turn
    opened = hf.AutoModel.from_pretrained(path, trust_remote_code=True)
    assert type(opened).__name__ == "TinyModel"
    assert differing(opened.state_dict(), saved) == []
    fresh = hf.AutoModel.from_config(config, trust_remote_code=True)
    load(path, model=fresh)
    assert differing(state(fresh), saved) == []
