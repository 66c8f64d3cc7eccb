"""Of a PEFT model its adapters are written, as PEFT writes them, and training goes on from them."""

from __future__ import annotations

import json
import socket
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import safetensors.torch
import torch

from vembed_async_ckpt import CheckpointError, load
from vembed_async_ckpt._format import names

from .architectures import build
from .checks import BOUND, differing, files, state, stock
from .conftest import Saver

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),  # of peft and transformers about each other
    pytest.mark.filterwarnings("ignore:(Unsupported layer type|Model has `tie_word_embeddings)"),
]

TARGETS = ["q_proj", "v_proj"]
DECODER = {"task_type": "CAUSAL_LM"}
METHODS: dict[str, Callable[[], Any]] = {
    "LoRA": lambda: peft.LoraConfig(r=2, target_modules=TARGETS, **DECODER),
    "LoRA without a task": lambda: peft.LoraConfig(r=2, target_modules=TARGETS),
    "DoRA": lambda: peft.LoraConfig(r=2, target_modules=TARGETS, use_dora=True, **DECODER),
    "rank-stabilized": lambda: peft.LoraConfig(r=2, target_modules="all-linear", use_rslora=True, **DECODER),
    "LoRA with biases": lambda: peft.LoraConfig(r=2, target_modules=TARGETS, bias="all", **DECODER),
    "LoRA of parameters": lambda: peft.LoraConfig(
        r=2, target_parameters=["q_proj.weight"], target_modules=[], **DECODER
    ),
    "modules to save": lambda: peft.LoraConfig(r=2, target_modules=TARGETS, modules_to_save=["norm"], **DECODER),
    "tokens": lambda: peft.LoraConfig(r=2, target_modules=TARGETS, trainable_token_indices=[3, 5], **DECODER),
    "tokens alone": lambda: peft.TrainableTokensConfig(
        token_indices=[3, 5], target_modules=["embed_tokens"], **DECODER
    ),
    "AdaLoRA": lambda: peft.AdaLoraConfig(init_r=4, target_r=2, total_step=10, target_modules=TARGETS, **DECODER),
    "IA3": lambda: peft.IA3Config(target_modules=[*TARGETS, "down_proj"], feedforward_modules=["down_proj"], **DECODER),
    "LoHa": lambda: peft.LoHaConfig(r=2, target_modules=TARGETS, **DECODER),
    "LoKr": lambda: peft.LoKrConfig(r=2, target_modules=TARGETS, **DECODER),
    "OFT": lambda: peft.OFTConfig(oft_block_size=4, target_modules=TARGETS, **DECODER),
    "HRA": lambda: peft.HRAConfig(r=2, target_modules=TARGETS, **DECODER),
    "VeRA": lambda: peft.VeraConfig(r=4, target_modules=["q_proj"], **DECODER),
    "Fourier": lambda: peft.FourierFTConfig(n_frequency=4, target_modules=TARGETS, **DECODER),
    "layer norms": lambda: peft.LNTuningConfig(target_modules=["norm"], **DECODER),
    "prompt": lambda: peft.PromptTuningConfig(num_virtual_tokens=3, **DECODER),
    "p-tuning": lambda: peft.PromptEncoderConfig(num_virtual_tokens=3, encoder_hidden_size=8, **DECODER),
    "prefix": lambda: peft.PrefixTuningConfig(num_virtual_tokens=3, **DECODER),
}


def adapted(method: str, seed: int = 1) -> Any:
    base = build("Qwen3, tied")
    torch.manual_seed(seed)
    model = peft.get_peft_model(base, METHODS[method]())
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * seed)  # LoRA's B starts at zero
    return model


def trained(model: Any) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.named_parameters() if tensor.requires_grad}


def change_trained(model: Any) -> None:
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(0.5)


PROMPTS = {"prompt", "p-tuning", "prefix"}  # PEFT writes what they give, not what is trained


@pytest.mark.parametrize("method", METHODS)
def test_a_method(saver: Saver, tmp_path: Path, method: str):
    """The files that PEFT writes with the same bytes, learned and replayed; both ways back give the adapter of the call."""
    model = adapted(method)
    for turn in ("learned", "replayed"):
        expected, saved = stock(model, tmp_path / turn), trained(model)
        handle = saver.checkpointer.save(next(saver.steps), model=model)
        change_trained(model)
        path = handle.result(BOUND).path
        assert set(expected) == {"adapter_config.json", "adapter_model.safetensors", "README.md"}
        found = files(path)
        assert (found.pop(names.UNCOVERED, None) is not None) == (method in PROMPTS)
        assert found == expected, turn
    assert differing(trained(model), saved)
    fresh = adapted(method, seed=2)
    load(path, model=fresh)
    assert differing(trained(fresh), saved) == []
    opened = peft.PeftModel.from_pretrained(build("Qwen3, tied"), path, is_trainable=method not in PROMPTS)
    if method != "p-tuning":  # of which PEFT keeps only what it gives
        parameters = dict(opened.named_parameters())
        assert differing({name: parameters[name].detach() for name in saved}, saved) == []


def test_several_adapters(saver: Saver, tmp_path: Path):
    """Each in a directory of its name, as PEFT has them; names that are the same in several files come back apart."""
    model, fresh = adapted("LoRA"), adapted("LoRA", seed=2)
    for module in (model, fresh):
        module.add_adapter("second", peft.LoraConfig(r=3, target_modules=["o_proj", "q_proj"], **DECODER))
    for turn in ("learned", "replayed"):
        expected, saved = stock(model, tmp_path / turn), state(model)
        path = saver.save(model)
        assert files(path) == expected, turn
    assert {"adapter_model.safetensors", "second/adapter_model.safetensors", "second/adapter_config.json"} <= set(
        expected
    )
    load(path, model=fresh)
    assert {name for name in differing(state(fresh), saved) if "lora_" in name} == set()
    opened = peft.PeftModel.from_pretrained(build("Qwen3, tied"), path)
    opened.load_adapter(path / "second", "second")
    assert {name for name in differing(opened.state_dict(), saved) if "lora_" in name} == set()


def test_an_adapter_that_comes_later(saver: Saver, tmp_path: Path):
    """A known plan sees new adapters, and those that went; an adapter that was not saved is missed."""
    model = adapted("LoRA")
    saver.save(model)
    model.add_adapter("second", METHODS["DoRA"]())
    expected = stock(model, tmp_path / "two")
    two = saver.save(model)
    assert files(two) == expected
    model.delete_adapter("second")
    expected = stock(model, tmp_path / "one")
    one = saver.save(model)
    assert files(one) == expected
    fresh = adapted("LoRA")
    with pytest.raises(CheckpointError, match=r"second\.weight is not in the model"):
        load(two, model=fresh)
    fresh.add_adapter("second", METHODS["DoRA"]())
    with pytest.raises(CheckpointError, match=r"second\.weight was not saved"):
        load(one, model=fresh)


def test_an_edited_adapter_config_is_saved_as_it_is(saver: Saver, tmp_path: Path):
    """What stands in an adapter's config is looked at before a known plan is used: values, lists and sets."""
    model = adapted("LoRA")
    saver.save(model)
    for edit in (
        lambda config: setattr(config, "lora_dropout", 0.25),
        lambda config: config.target_modules.add("later"),
        lambda config: setattr(config, "revision", "other"),
    ):
        edit(model.peft_config["default"])
        expected = stock(model, tmp_path / "stock")
        assert files(saver.save(model)) == expected


# -- what of the base is trained is not lost


def thawed(model: Any) -> None:
    model.get_base_model().model.norm.weight.requires_grad_(True)


def test_what_is_trained_beside_the_adapter_comes_back(saver: Saver, tmp_path: Path):
    """PEFT leaves a thawed weight of the base out: it is saved in a file of ours, from when it is thawed; and the base is not."""
    model = adapted("LoRA")
    assert names.UNCOVERED not in files(saver.save(model))
    thawed(model)
    expected, saved = stock(model, tmp_path / "stock"), trained(model)
    path = saver.save(model)
    found = files(path)
    extra = safetensors.torch.load(found.pop(names.UNCOVERED))
    assert found == expected
    assert list(extra) == ["base_model.model.model.norm.weight"]
    fresh = adapted("LoRA", seed=2)
    thawed(fresh)
    load(path, model=fresh)
    assert differing(trained(fresh), saved) == []


def test_running_statistics_under_an_adapter_come_back(saver: Saver):
    """The base's BatchNorm goes on counting while its weights are frozen; its buffers are saved, its weights are not."""
    config = peft.LoraConfig(r=2, target_modules=["convolution"])
    model, fresh = (peft.get_peft_model(build("ResNet", seed), config) for seed in (11, 12))
    saved = state(model)
    path = saver.save(model)
    extra = safetensors.torch.load_file(path / names.UNCOVERED)
    assert {name.rpartition(".")[2] for name in extra} == {"running_mean", "running_var", "num_batches_tracked"}
    load(path, model=fresh)
    wrong = differing(state(fresh), saved)
    assert wrong
    assert [name for name in wrong if "lora_" in name or name in extra] == []


def test_an_adapter_that_transformers_added(saver: Saver, tmp_path: Path):
    """`model.add_adapter`: the model is transformers', its save_pretrained writes the adapter alone."""
    model, fresh = build("Qwen3, tied"), build("Qwen3, tied")
    for seed, module in enumerate((model, fresh)):
        torch.manual_seed(seed)
        module.add_adapter(METHODS["LoRA"]())
    for turn in ("learned", "replayed"):
        expected, saved = stock(model, tmp_path / turn), trained(model)
        handle = saver.checkpointer.save(next(saver.steps), model=model)
        change_trained(model)
        path = handle.result(BOUND).path
        assert "model.safetensors" not in expected
        assert files(path) == expected, turn
    load(path, model=fresh)
    assert differing(trained(fresh), saved) == []


@pytest.mark.parametrize("wrap", [torch.compile, lambda model: torch.compile(torch.nn.DataParallel(model))])
def test_a_wrapped_peft_model(saver: Saver, tmp_path: Path, wrap: Callable[[Any], Any]):
    """Names on disk are those of the model inside, and it comes back into one that is wrapped too."""
    model, fresh = adapted("LoRA"), adapted("LoRA", seed=2)
    expected, saved = stock(model, tmp_path / "stock"), trained(model)
    path = saver.save(wrap(model))
    assert files(path) == expected
    load(path, model=wrap(fresh))
    assert differing(trained(fresh), saved) == []


def test_a_base_that_is_compiled_inside(saver: Saver, tmp_path: Path):
    """`PeftModel` around `torch.compile`: the files are those of the adapter without it, and training goes on."""
    model, fresh, plain = adapted("LoRA"), adapted("LoRA", seed=2), adapted("LoRA", seed=3)
    expected = stock(model, tmp_path / "stock")["adapter_model.safetensors"]
    for module in (model, fresh):
        module.base_model.model = torch.compile(module.base_model.model)
    saved = trained(model)
    assert any("_orig_mod" in name for name in saved)
    path = saver.save(model)
    assert files(path)["adapter_model.safetensors"] == expected
    for other in (fresh, plain):
        load(path, model=other)
    assert differing(trained(fresh), saved) == []
    assert differing(trained(plain), {name.replace("_orig_mod.", ""): tensor for name, tensor in saved.items()}) == []


def test_training_goes_on_from_an_adapter(saver: Saver):
    """Adapter and optimizer into a fresh model: the next steps are those of the run that saved."""

    def step(model: Any, optimizer: Any) -> None:
        optimizer.zero_grad()
        model(torch.arange(8)[None]).logits.pow(2).mean().backward()
        optimizer.step()

    runs = [adapted("DoRA", seed).eval() for seed in (1, 2)]
    optimizers = [torch.optim.AdamW([p for p in run.parameters() if p.requires_grad], lr=0.1) for run in runs]
    for run, optimizer in zip(runs, optimizers, strict=True):
        step(run, optimizer)
    handle = saver.checkpointer.save(next(saver.steps), model=runs[0], optimizer=optimizers[0])
    step(runs[0], optimizers[0])
    path = handle.result(BOUND).path
    load(path, model=runs[1], optimizer=optimizers[1])
    step(runs[1], optimizers[1])
    assert differing(trained(runs[0]), trained(runs[1])) == []


# -- nobody is asked


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Attempts to reach anything; each fails."""
    attempts: list[Any] = []

    def refuse(*args: Any, **kwargs: Any) -> Any:
        attempts.append(args)
        raise OSError("no network here")

    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr("peft.utils.other.file_exists", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    return attempts


@pytest.mark.filterwarnings("ignore:(Unable to fetch remote file|Could not find a config file)")
def test_a_base_from_the_hub_is_not_asked_for(saver: Saver, tmp_path: Path, no_network: list[Any]):
    """PEFT itself asks the hub for the base's vocabulary at every save; a save of ours does not, and writes the same."""
    model = adapted("LoRA")
    model.get_base_model().name_or_path = model.peft_config["default"].base_model_name_or_path = "somebody/base"
    saved = state(model)
    path = saver.save(model)
    assert no_network == []
    assert json.loads((path / "adapter_config.json").read_bytes())["base_model_name_or_path"] == "somebody/base"
    model.load_state_dict(saved)
    expected = stock(model, tmp_path / "stock")
    assert no_network, "PEFT's own save asks"
    assert files(path) == expected


@pytest.mark.parametrize("vocabulary", [40, 48])
def test_resized_embeddings_are_noticed_from_the_cache(
    saver: Saver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_network: list[Any], vocabulary: int
):
    """The base's config in the hub's local cache says whether the embeddings grew and must be saved with the adapter."""
    cache = tmp_path / "hub" / "models--somebody--base"
    snapshot = cache / "snapshots" / "0123"
    build("Qwen3, tied").save_pretrained(snapshot)
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text("0123")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    base = build("Qwen3, tied")
    base.resize_token_embeddings(vocabulary)
    base.name_or_path = "somebody/base"
    model = peft.get_peft_model(base, METHODS["LoRA"]())
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Setting `save_embedding_layers`")
        path = saver.save(model)
    saved = safetensors.torch.load_file(path / "adapter_model.safetensors")
    assert any("embed_tokens" in name for name in saved) == (vocabulary == 48)
    assert json.loads((path / "adapter_config.json").read_bytes())["base_model_name_or_path"] == "somebody/base"
    assert no_network == []
