"""Modules with a `save_pretrained` of their own, as vembed wraps its backbones: what it pickles or forgets comes back."""

from __future__ import annotations

import json
import os
import pickle
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import peft
import pytest
import safetensors.torch
import torch
from accelerate import Accelerator

from vembed_async_ckpt import AsyncCheckpointer, load, save_checkpoint
from vembed_async_ckpt._format import names
from vembed_async_ckpt.integrations.vembed import close_shared

from .architectures import build
from .checks import BOUND, change, differing, files, state, stock
from .conftest import Saver

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # of peft and transformers about each other


class Backbone(torch.nn.Module):
    """A model of transformers or PEFT, and a head beside it that is pickled."""

    def __init__(self, backbone: Any, seed: int) -> None:
        super().__init__()
        self.backbone = backbone
        torch.manual_seed(seed)
        self.head = torch.nn.Linear(16, 4, bias=False)

    def save_pretrained(self, save_directory: str) -> None:
        self.backbone.save_pretrained(save_directory)
        torch.save(self.head.state_dict(), os.path.join(save_directory, "projection_head.pt"))


class Facade(torch.nn.Module):
    """What training sees: it hands everything on."""

    def __init__(self, backend: torch.nn.Module) -> None:
        super().__init__()
        self.backend = backend
        self.config = getattr(getattr(backend, "backbone", None), "config", None)

    def save_pretrained(self, save_directory: str) -> None:
        self.backend.save_pretrained(save_directory)


class Encoder(torch.nn.Module):
    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model


class Composed(torch.nn.Module):
    """Two encoders in directories of their own, and two pickled projections at the top."""

    def __init__(self, text: Any, image: Any, seed: int) -> None:
        super().__init__()
        self.text_encoder, self.image_encoder = Encoder(text), Encoder(image)
        torch.manual_seed(seed)
        self.text_projection = torch.nn.Sequential(torch.nn.Linear(16, 16), torch.nn.GELU(), torch.nn.Linear(16, 4))
        self.image_projection = torch.nn.Linear(16, 4, bias=False)

    def save_pretrained(self, save_directory: str) -> None:
        os.makedirs(save_directory, exist_ok=True)
        for side in ("text", "image"):
            encoder, projection = getattr(self, f"{side}_encoder"), getattr(self, f"{side}_projection")
            encoder.model.save_pretrained(os.path.join(save_directory, f"{side}_encoder"))
            torch.save(projection.state_dict(), os.path.join(save_directory, f"{side}_projection.pt"))


WRAPPED: dict[str, Callable[[int], torch.nn.Module]] = {
    "single": lambda seed: Facade(Backbone(build("Bert", seed), seed)),
    "tied": lambda seed: Facade(Backbone(build("Qwen3, tied", seed), seed)),
    "experts": lambda seed: Facade(Backbone(build("Mixtral, parts", seed), seed)),
    "composed": lambda seed: Facade(Composed(build("Bert", seed), build("ViT", seed), seed)),
    "composed of alike": lambda seed: Facade(Composed(build("Bert", seed), build("Bert", seed + 1), seed)),
}


def with_extra(directory: Path) -> tuple[dict[str, bytes], dict[str, torch.Tensor]]:
    """What `save_pretrained` would have written of a checkpoint, and what ours saved besides."""
    found = files(directory)
    return found, safetensors.torch.load(found.pop(names.UNCOVERED))


HEADS = {"head", "text_projection", "image_projection"}


@pytest.mark.parametrize("name", WRAPPED)
def test_a_wrapper(saver: Saver, tmp_path: Path, name: str):
    """Files and pickles as the wrapper writes them at each call; the heads are in a file of ours too, and all comes back."""
    model = WRAPPED[name](11)
    for turn in ("first", "second"):
        expected, saved = stock(model, tmp_path / turn), state(model)
        path = saver.save(model)
        found, extra = with_extra(path)
        assert found == expected, turn
    assert any(file.endswith(".pt") for file in expected)
    heads = {key: value for key, value in saved.items() if key.split(".")[1] in HEADS}
    assert differing(extra, heads) == []
    fresh = WRAPPED[name](21)
    load(path, model=fresh)
    assert differing(state(fresh), saved) == []


def test_wrappers_with_names(saver: Saver, tmp_path: Path):
    """Of several models each has a directory, with its own file of what its save_pretrained does not store."""
    models = {"student": WRAPPED["single"](1), "teacher": WRAPPED["composed"](2)}
    expected = {name: stock(model, tmp_path / name) for name, model in models.items()}
    saved = {name: state(model) for name, model in models.items()}
    handle = saver.checkpointer.save(next(saver.steps), model=models)
    for model in models.values():
        change(model)
    path = handle.result(BOUND).path
    fresh = {"student": WRAPPED["single"](3), "teacher": WRAPPED["composed"](4)}
    load(path, model=fresh)
    for name in models:
        assert with_extra(path / name)[0] == expected[name]
        assert differing(state(fresh[name]), saved[name]) == []


def test_a_wrapper_that_pickles_nothing_is_learned_once(saver: Saver, tmp_path: Path):
    """Its save_pretrained runs for the first save; later ones replay, also after a nested config was edited."""
    calls = []

    class Thin(Facade):
        def save_pretrained(self, save_directory: str) -> None:
            calls.append(save_directory)
            self.backend.save_pretrained(save_directory)

    model = Thin(build("CLIP"))
    for _ in range(3):
        path = saver.save(model)
    assert len(calls) == 1
    assert names.UNCOVERED not in files(path)
    model.backend.config.text_config.hidden_act = "relu"
    expected = stock(model, tmp_path / "edited")
    assert files(saver.save(model)) == expected


class Counting(Backbone):
    """Notes that its save_pretrained ran, and may write more than its base does."""

    calls: ClassVar[list[str]] = []  # not of the module: an attribute that changes is a reason to run it again
    more: Callable[[Counting, Path], None] = staticmethod(lambda model, directory: None)

    def __init__(self, seed: int) -> None:
        super().__init__(build("Bert"), seed)
        self.logit_scale = torch.nn.Parameter(torch.tensor(float(seed)))
        self.notes = {"epoch": 1, "dims": [4]}
        self.step = 1

    def save_pretrained(self, save_directory: str) -> None:
        self.calls.append(save_directory)
        super().save_pretrained(save_directory)
        self.more(self, Path(save_directory))


def test_pickles_of_live_tensors_are_made_again_without_it(saver: Saver, tmp_path: Path):
    """A head that is nothing but tensors of the model: its file is as torch.save writes it then, whatever was changed."""
    model = Counting(1)
    model.calls.clear()

    def grown(module: Counting) -> None:
        module.head.weight.data = torch.randn(7, 16)

    def moved(module: Counting) -> None:
        module.head.weight.data = torch.randn_like(module.head.weight)

    def replaced(module: Counting) -> None:
        module.head = torch.nn.Linear(16, 3)

    expected = []
    for step, edit in enumerate((change, moved, grown, change, replaced, change)):
        expected.append(stock(model, tmp_path / str(step)))
        assert with_extra(saver.save(model))[0] == expected[-1]
        edit(model)
    assert len({files["projection_head.pt"] for files in expected}) == len(expected)
    assert len(model.calls) - len(expected) == 3, "at first, when it had grown, and when it was replaced"


def a_number(model: Counting, directory: Path) -> None:
    (directory / "scale.json").write_text(str(model.logit_scale.item()))


def an_attribute(model: Counting, directory: Path) -> None:
    (directory / "step.json").write_text(str(model.step))


def a_nested_attribute(model: Counting, directory: Path) -> None:
    (directory / "notes.json").write_text(json.dumps(model.notes))


def a_plain_pickle(model: Counting, directory: Path) -> None:
    (directory / "scale.data").write_bytes(pickle.dumps(model.backbone.pooler.dense.bias.detach()))


def a_pickle_with_a_number(model: Counting, directory: Path) -> None:
    torch.save({"scale": model.logit_scale.detach(), "at": model.step}, directory / "scale.pt")


def a_pickle_of_something_computed(model: Counting, directory: Path) -> None:
    torch.save({"scale": model.logit_scale.detach().exp()}, directory / "scale.pt")


def a_pickle_of_another_suffix(model: Counting, directory: Path) -> None:
    torch.save([model.logit_scale.detach(), model.logit_scale.detach()], directory / "scale.weights")


def a_pickle_of_parameters(model: Counting, directory: Path) -> None:
    torch.save({"scale": model.logit_scale}, directory / "scale.pt")


def an_array(model: Counting, directory: Path) -> None:
    (directory / "scale.raw").write_bytes(model.logit_scale.detach().numpy().tobytes())


def later(model: Counting) -> None:
    model.step += 1


def noted(model: Counting) -> None:
    model.notes["dims"].append(5)


@pytest.mark.parametrize(
    ("more", "edit"),
    [
        (a_number, change), (an_attribute, later), (a_nested_attribute, noted), (a_plain_pickle, change),
        (a_pickle_with_a_number, later), (a_pickle_of_something_computed, change), (a_pickle_of_another_suffix, change),
        (a_pickle_of_parameters, change), (an_array, change),
    ],
    ids=lambda value: value.__name__,
)  # fmt: skip
def test_whatever_a_wrapper_writes_is_as_of_the_call(
    saver: Saver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: Any, edit: Callable[[Counting], None]
):
    """Numbers, attributes, pickles of any kind: no file is that of an earlier save."""
    monkeypatch.setattr(Counting, "more", staticmethod(more))
    model = Counting(1)
    seen = set()
    for step in range(3):
        expected = stock(model, tmp_path / str(step))
        handle = saver.checkpointer.save(next(saver.steps), model=model)
        edit(model)
        found, _ = with_extra(handle.result(BOUND).path)
        assert found == expected
        seen |= {data for file, data in found.items() if file.partition(".")[0] in ("scale", "step", "notes")}
    assert len(seen) == 3


@pytest.mark.parametrize("trained", [True, False])
def test_a_head_that_is_pickled_comes_back_frozen_or_not(saver: Saver, trained: bool):
    """What a wrapper pickles belongs to its state, whether it is trained at the moment or not."""
    model, fresh = WRAPPED["single"](1), WRAPPED["single"](2)
    model.backend.head.requires_grad_(trained)
    saved = state(model)
    load(saver.save(model), model=fresh)
    assert differing(state(fresh), saved) == []


class Forgetful(Backbone):
    """Has more than its save_pretrained thinks of."""

    def __init__(self, backbone: Any, seed: int) -> None:
        super().__init__(backbone, seed)
        self.logit_scale = self.temperature = torch.nn.Parameter(torch.tensor(float(seed)))
        self.register_buffer("queue", torch.randn(3, 4))
        self.register_buffer("scratch", torch.randn(3), persistent=False)


def test_what_a_wrapper_forgets_is_saved(saver: Saver):
    """Trained parameters, once under however many names, and persistent buffers that appear in no file of save_pretrained."""
    model, fresh = Forgetful(build("Bert"), 1), Forgetful(build("Bert"), 2)
    saved = state(model)
    path = saver.save(model)
    assert with_extra(path)[1].keys() == {"head.weight", "logit_scale", "queue"}
    load(path, model=fresh)
    assert differing(state(fresh), saved) == []


class HeadOnly(Backbone):
    def save_pretrained(self, save_directory: str) -> None:
        torch.save(self.head.state_dict(), os.path.join(save_directory, "projection_head.pt"))


def test_a_frozen_base_that_a_wrapper_leaves_out_stays_out(saver: Saver, tmp_path: Path):
    """It is frozen and in no file: on purpose. Thawed it is part of what is trained, and from then on saved."""
    model, fresh = HeadOnly(build("Bert"), 1), HeadOnly(build("Bert"), 2)
    model.backbone.requires_grad_(False)
    for _ in range(2):
        expected, head = stock(model, tmp_path / "frozen"), state(model.head)
        handle = saver.checkpointer.save(next(saver.steps), model=model)
        change(model.head)
        found, extra = with_extra(handle.result(BOUND).path)
        assert found == expected
        assert extra.keys() == {"head.weight"}
    load(handle.path, model=fresh)
    assert differing(state(fresh), {**state(model), "head.weight": head["weight"]}) == []
    model.backbone.requires_grad_(True)
    saved = state(model)
    path = saver.save(model)
    assert with_extra(path)[1].keys() == saved.keys()
    load(path, model=fresh)
    assert differing(state(fresh), saved) == []


def lora(seed: int) -> torch.nn.Module:
    config = peft.LoraConfig(r=2, target_modules=["query", "value"])
    model = Facade(Backbone(peft.get_peft_model(build("Bert"), config), seed))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_()
    return model


def test_lora_inside_a_wrapper(saver: Saver, tmp_path: Path):
    """Adapter and head are saved, the frozen base is not: neither by the wrapper nor by us."""
    model, fresh = lora(1), lora(2)
    for turn in ("first", "second"):
        expected, saved = stock(model, tmp_path / turn), state(model)
        handle = saver.checkpointer.save(next(saver.steps), model=model)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data.add_(0.5)
        path = handle.result(BOUND).path
        found, extra = with_extra(path)
        assert found == expected, turn
    assert set(found) == {"adapter_config.json", "adapter_model.safetensors", "README.md", "projection_head.pt"}
    assert extra.keys() == {"backend.head.weight"}
    load(path, model=fresh)
    assert differing(state(fresh), saved) == []


def test_an_edited_adapter_config_inside_a_wrapper(saver: Saver, tmp_path: Path):
    """What is written of a part deeper in the module is looked at too before a known plan is used."""
    model = Facade(lora(1).backend.backbone)
    saver.save(model)
    model.backend.peft_config["default"].target_modules.add("later")
    expected = stock(model, tmp_path / "edited")
    assert files(saver.save(model)) == expected


def test_a_head_that_is_tied_to_the_backbone(saver: Saver):
    """Stored once, by the backbone; and a tie again in the model that gets it."""

    def tied(seed: int) -> torch.nn.Module:
        model = Backbone(build("Bert", seed), seed)
        model.head.weight = model.backbone.embeddings.word_embeddings.weight
        return model

    model, fresh = tied(1), tied(2)
    saved = state(model)
    path = saver.save(model)
    assert names.UNCOVERED not in files(path)
    load(path, model=fresh)
    assert differing(state(fresh), saved) == []
    assert fresh.head.weight is fresh.backbone.embeddings.word_embeddings.weight


class Casting(Backbone):
    """Publishes its weights in half precision."""

    def save_pretrained(self, save_directory: str) -> None:
        half = {name: tensor.half() for name, tensor in self.backbone.state_dict().items()}
        safetensors.torch.save_file(half, os.path.join(save_directory, "model.safetensors"))


def test_what_a_wrapper_casts_comes_back_in_full(saver: Saver, tmp_path: Path):
    """Its file is in half precision, as it is at each call; training goes on from the full values."""
    model, fresh = Casting(build("Bert"), 1), Casting(build("Bert"), 2)
    for turn in ("first", "second"):
        expected, saved = stock(model, tmp_path / turn), state(model)
        path = saver.save(model)
        assert with_extra(path)[0] == expected, turn
    load(path, model=fresh)
    assert differing(state(fresh), saved) == []


@pytest.mark.usefixtures("small_is_late")
@pytest.mark.parametrize("staging", ["overlap", "blocking"])
def test_training_goes_on_from_a_wrapper(root: Path, staging: Any):
    """The head is copied beside the training like every weight: the next steps are those of the run that saved."""

    def step(model: Any, optimizer: Any) -> None:
        optimizer.zero_grad()
        model.head(model.backbone(torch.arange(8)[None]).last_hidden_state).pow(2).mean().backward()
        optimizer.step()

    runs = [Backbone(build("Bert", seed), seed) for seed in (1, 2)]
    optimizers = [torch.optim.AdamW(run.parameters(), lr=0.1) for run in runs]
    for run, optimizer in zip(runs, optimizers, strict=True):
        step(run, optimizer)
    with AsyncCheckpointer(root, writer="thread", staging=staging) as checkpointer:
        handle = checkpointer.save(1, model=runs[0], optimizer=optimizers[0])
        step(runs[0], optimizers[0])
        path = handle.result(BOUND).path
    load(path, model=runs[1], optimizer=optimizers[1])
    step(runs[1], optimizers[1])
    assert differing(state(runs[0]), state(runs[1])) == []


@pytest.mark.usefixtures("small_is_late")
def test_a_weight_that_no_optimizer_has_any_more_is_copied_at_once(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A wrapper that is read anew for every save: what may be copied late is settled by the tensors of now."""
    monkeypatch.setattr(Counting, "more", staticmethod(a_number))
    model = Counting(1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with AsyncCheckpointer(root, writer="thread", staging="overlap") as checkpointer:
        optimizer.step()
        checkpointer.save(1, model=model, optimizer=optimizer).result(BOUND)
        model.head.weight = torch.nn.Parameter(torch.randn_like(model.head.weight))
        saved, go_on = state(model), threading.Event()
        checkpointer._engine._staging_thread.submit(lambda: go_on.wait(BOUND))
        handle = checkpointer.save(2, model=model, optimizer=optimizer)
        model.head.weight.data.add_(1)
        go_on.set()
        path = handle.result(BOUND).path
    assert torch.equal(with_extra(path)[1]["head.weight"], saved["head.weight"])


def test_save_checkpoint_of_a_wrapper(root: Path):
    """vembed's call: the backbone's file has its second name, and `load` restores the wrapper that accelerate prepared."""
    accelerator = Accelerator(cpu=True)
    model = accelerator.prepare(WRAPPED["single"](1))
    saved = state(model)
    path = save_checkpoint(root / "checkpoint-step-1", model, accelerator, training_state=False).result(BOUND).path
    close_shared(BOUND)
    assert os.path.samefile(path / "model.safetensors", path / "model_state_dict.safetensors")
    assert json.loads((path / names.MANIFEST).read_bytes())["names"][""]["uncovered"] == [names.UNCOVERED]
    fresh = WRAPPED["single"](2)
    load(path, model=fresh)
    assert differing(state(fresh), saved) == []
