"""Wrappers that come or go between save and load: the files have clean names, and `load` can do what `load_state_dict` can."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as hf
from accelerate import Accelerator
from accelerate.utils import compile_regions
from safetensors.torch import load_file
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from vembed_async_ckpt import AsyncCheckpointer, load, save_checkpoint
from vembed_async_ckpt._format import names
from vembed_async_ckpt.integrations.vembed import close_shared

from .architectures import build
from .checks import BOUND, change, differing, files, state, stock

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),  # of peft and transformers about each other
    pytest.mark.filterwarnings("ignore:torch.nn.DataParallel:UserWarning"),
]


def compiled(module: torch.nn.Module) -> Any:
    return torch.compile(module, backend="eager")


class Renaming(torch.nn.Module):
    """A wrapper of somebody's own: its state_dict has the names of what is inside."""

    def __init__(self, inner: torch.nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self._register_state_dict_hook(self.without)
        self.register_load_state_dict_pre_hook(self.with_)

    @staticmethod
    def without(module: Any, state: dict[str, Any], prefix: str, _: Any) -> None:
        for key in [key for key in state if key.startswith(prefix + "inner.")]:
            state[prefix + key[len(prefix) + len("inner.") :]] = state.pop(key)

    @staticmethod
    def with_(module: Any, state: dict[str, Any], prefix: str, *_: Any) -> None:
        for key in [key for key in state if key.startswith(prefix)]:
            state[prefix + "inner." + key[len(prefix) :]] = state.pop(key)


WRAPS: dict[str, Callable[[torch.nn.Module], Any]] = {
    "nothing": lambda module: module,
    "compile": compiled,
    "activation checkpoints": checkpoint_wrapper,
    "compile inside": lambda module: checkpoint_wrapper(compiled(module)),
    "compile outside": lambda module: compiled(checkpoint_wrapper(module)),
    "DataParallel": torch.nn.DataParallel,
    "all": lambda module: compiled(torch.nn.DataParallel(checkpoint_wrapper(compiled(module)))),
    "hooks": Renaming,
}


def plain_net(seed: int) -> torch.nn.Module:
    torch.manual_seed(seed)
    inner = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.BatchNorm1d(4))
    return torch.nn.Sequential(torch.nn.Linear(4, 4), inner)


def net(seed: int, wrap: str) -> torch.nn.Module:
    """A member of it wrapped, and a layer of that member too."""
    module = plain_net(seed)
    if wrap != "hooks":
        module[1][0] = WRAPS[wrap](module[1][0])  # type: ignore[index, operator]
    module[1] = WRAPS[wrap](module[1])
    return module


def take_step(module: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    for number, parameter in enumerate(module.parameters(), 1):
        parameter.grad = torch.full_like(parameter, number)
    optimizer.step()


@pytest.mark.parametrize("after", WRAPS)
@pytest.mark.parametrize("before", WRAPS)
def test_wrappers_around_parts(root: Path, before: str, after: str):
    """Saved with one and loaded with another, in every pair: same tensors, clean names in the file, and the same next step."""
    module, fresh = net(1, before), net(2, after)
    optimizer, again = (torch.optim.Adam(each.parameters(), lr=0.1) for each in (module, fresh))
    with AsyncCheckpointer(root, writer="thread") as checkpointer:
        for step in (1, 2):
            take_step(module, optimizer)
            path = checkpointer.save(step, model=module, optimizer=optimizer).result(BOUND).path
            expected = [tensor.clone() for tensor in (*module.parameters(), *module.buffers())]
            if step == 1:
                change(module)
    assert sorted(load_file(path / "model.safetensors")) == sorted(plain_net(0).state_dict())
    load(path, model=fresh, optimizer=again)
    for tensor, saved in zip((*fresh.parameters(), *fresh.buffers()), expected, strict=True):
        assert torch.equal(tensor, saved)
    take_step(module, optimizer)
    take_step(fresh, again)
    assert all(map(torch.equal, fresh.parameters(), module.parameters()))


def test_a_wrapper_put_on_between_two_saves(root: Path):
    """What is kept from the first save does not name the second."""
    module = plain_net(1)
    with AsyncCheckpointer(root, writer="thread") as checkpointer:
        checkpointer.save(1, model=module).result(BOUND)
        module[1] = compiled(module[1])
        path = checkpointer.save(2, model=module).result(BOUND).path
    assert sorted(load_file(path / "model.safetensors")) == sorted(plain_net(0).state_dict())


def layers_compiled(model: Any) -> Any:
    layers = model.encoder.layer if hasattr(model, "encoder") else model.model.layers
    for index, layer in enumerate(layers):
        layers[index] = compiled(layer)
    return model


def layers_checkpointed(model: Any) -> Any:
    layers = model.encoder.layer if hasattr(model, "encoder") else model.model.layers
    for index, layer in enumerate(layers):
        layers[index] = checkpoint_wrapper(compiled(layer))
    return model


def regions(model: Any) -> Any:
    return compile_regions(model, backend="eager")


@pytest.mark.parametrize("wrap", [layers_compiled, layers_checkpointed, regions], ids=lambda wrap: wrap.__name__)
@pytest.mark.parametrize("family", ["Llama", "Qwen3, tied", "Mixtral, parts", "Bert"])
def test_models_of_transformers_compiled_by_regions(
    root: Path, tmp_path: Path, family: str, wrap: Callable[[Any], Any]
):
    """The directory is, byte for byte, that of the model without wrappers: `from_pretrained` gives the trained weights. It loads
    into the wrapped model and the plain one, and a plain one's into the wrapped."""
    plain, fresh = build(family, 1), build(family, 2)
    expected, saved = stock(plain, tmp_path / "stock"), state(plain)
    model, again = wrap(build(family, 1)), wrap(build(family, 3))
    assert any("_orig_mod" in name for name in dict(model.named_parameters()))
    with AsyncCheckpointer(root, writer="thread") as checkpointer:
        path = checkpointer.save(1, model=model).result(BOUND).path
        unwrapped = checkpointer.save(2, model=plain).result(BOUND).path
    assert files(path) == expected
    assert differing(state(type(plain).from_pretrained(path)), saved) == []
    load(path, model=fresh)
    assert differing(state(fresh), saved) == []
    for source in (path, unwrapped):
        change(again)
        load(source, model=again)
        for tensor, other in zip(again.parameters(), plain.parameters(), strict=True):
            assert torch.equal(tensor, other)


def test_save_checkpoint_under_regional_compilation(root: Path):
    """Weights, their second name, and the whole state beside an adapter: clean names in all of them."""
    accelerator = Accelerator(cpu=True)
    model = accelerator.prepare(regions(build("Llama", 1)))
    save_checkpoint(root / "step-1", model, accelerator).result(BOUND)
    expected = build("Llama", 1).state_dict()
    for file in ("model.safetensors", "model_state_dict.safetensors"):
        assert differing(load_file(root / "step-1" / file), expected) == []
    assert differing(state(hf.AutoModelForCausalLM.from_pretrained(root / "step-1")), expected) == []
    accelerator._models.clear()
    adapter = peft.get_peft_model(build("Llama", 1), peft.LoraConfig(r=2, target_modules=["q_proj"]))
    expected = state(adapter)
    adapter = accelerator.prepare(regions(adapter))
    save_checkpoint(root / "step-2", adapter, accelerator, base_model=True).result(BOUND)
    assert differing(load_file(root / "step-2" / "model.safetensors"), expected) == []
    assert not [name for name in load_file(root / "step-2" / "adapter_model.safetensors") if "_orig_mod" in name]
    close_shared()


def test_a_directory_with_the_wrappers_names(root: Path, monkeypatch: pytest.MonkeyPatch):
    """As releases before wrote it: their files and manifests name the wrappers, and still load into anything."""
    from vembed_async_ckpt._capture import model as models
    from vembed_async_ckpt._capture import tensor_map as places
    from vembed_async_ckpt._capture import wrappers

    module = net(1, "compile")
    expected = [tensor.clone() for tensor in (*module.parameters(), *module.buffers())]
    with monkeypatch.context() as patch:
        patch.setattr(wrappers, "inner_name", lambda module: None)
        patch.setattr(models, "innermost", lambda module: module)
        patch.setattr(places, "named_parts", lambda module: module.named_modules(remove_duplicate=False))
        with AsyncCheckpointer(root, writer="thread") as checkpointer:
            path = checkpointer.save(1, model=module).result(BOUND).path
    assert "_orig_mod" in (path / names.MANIFEST).read_text() + str(list(load_file(path / "model.safetensors")))
    for wrap in WRAPS:
        fresh = net(2, wrap)
        load(path, model=fresh)
        for tensor, saved in zip((*fresh.parameters(), *fresh.buffers()), expected, strict=True):
            assert torch.equal(tensor, saved)


def test_a_replaced_state_dict_that_shows_an_adapter_only(root: Path):
    """As in alpaca-lora: the adapter is saved under PEFT's names, and comes back into a model whose state_dict is its own."""

    def adapted(seed: int) -> Any:
        torch.manual_seed(seed)
        model = build("Llama", 1)
        return peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))

    model, fresh, alike = adapted(1), adapted(2), adapted(3)
    for each in (model, alike):
        own = each.state_dict
        each.state_dict = (lambda own: lambda *_, **__: peft.get_peft_model_state_dict(each, own()))(own)  # noqa: B023
    with AsyncCheckpointer(root, writer="thread") as checkpointer:
        path = checkpointer.save(1, model=model).result(BOUND).path
    for other in (fresh, alike):
        load(path, model=other)
        for tensor, saved in zip(other.parameters(), model.parameters(), strict=True):
            assert torch.equal(tensor, saved)
