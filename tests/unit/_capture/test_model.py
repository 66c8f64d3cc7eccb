"""Models on disk are what `save_pretrained` writes, as they were at the call, again and again, whatever was changed in between."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import transformers as hf

from vembed_async_ckpt import AsyncCheckpointer, PlanError, load
from vembed_async_ckpt._capture import model as models
from vembed_async_ckpt._format import names

from ...parity.architectures import build
from ...parity.checks import BOUND, change, files, stock


@pytest.fixture
def computing(monkeypatch: pytest.MonkeyPatch) -> None:
    """As for a family whose conversion cannot do without contiguous copies: save_pretrained computes."""
    captured = models._captured

    def refusing(save_pretrained: Any, options: Any, *, in_place: bool) -> Any:
        if in_place:
            raise RuntimeError("view size is not compatible with input tensor's size and stride")
        return captured(save_pretrained, options, in_place=in_place)

    monkeypatch.setattr(models, "_captured", refusing)


@pytest.mark.parametrize("shards", ["50GB", "10KB"])
def test_what_a_conversion_computes_is_computed_for_every_save(
    root: Path, tmp_path: Path, computing: None, shards: str
):
    """Nothing computed is kept for the next save; the manifest says what was; the bytes are stock's, shards included."""
    model = build("Mixtral, parts")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer.step()
    with AsyncCheckpointer(root, writer="thread", max_shard_size=shards) as checkpointer:
        for step in (1, 2):
            expected = stock(model, tmp_path / str(step), max_shard_size=shards)
            path = checkpointer.save(step, model=model).result(BOUND).path
            assert files(path) == expected
            assert json.loads((path / names.MANIFEST).read_bytes())["names"][""]["computed"]
            change(model)


class Computing(torch.nn.Linear):
    """Its state_dict shows a value that is none of its tensors."""

    def __init__(self) -> None:
        super().__init__(3, 3)
        self.register_state_dict_post_hook(
            lambda module, state, prefix, _: state.update({prefix + "twice": state["weight"] * 2})
        )


def test_what_a_hook_computes_is_computed_for_every_save(root: Path):
    """And it is that of the call, though the weight changes at once."""
    module = Computing()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    optimizer.step()
    with AsyncCheckpointer(root, writer="thread") as checkpointer:
        for step in (1, 2, 3):
            expected = plain_image(module)
            path = checkpointer.save(step, model=module).result(BOUND).path
            assert (path / "model.safetensors").read_bytes() == expected
            change(module)


def test_from_pretrained_opens_it(root: Path):
    """The directory is a model of transformers: same class, same weights."""
    model = build("GPT2, tied")
    with AsyncCheckpointer(root, writer="thread") as checkpointer:
        path = checkpointer.save(1, model=model).result(BOUND).path
    loaded = hf.AutoModelForCausalLM.from_pretrained(path)
    assert loaded.lm_head.weight is loaded.transformer.wte.weight
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor)


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of peft and transformers about each other
def test_peft_saves_its_adapter(root: Path, tmp_path: Path):
    """Of a PEFT model the adapter alone is written, as its own save_pretrained does it; learned and replayed."""
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(build("Bert"), peft.LoraConfig(r=2, target_modules=["query", "value"]))
    with AsyncCheckpointer(root, writer="thread") as checkpointer:
        for step in (1, 2):
            expected = stock(model, tmp_path / str(step))
            assert {"adapter_config.json", "adapter_model.safetensors"} <= set(expected)
            assert "model.safetensors" not in expected
            path = checkpointer.save(step, model=model).result(BOUND).path
            assert files(path) == expected
            saved = {name: tensor.clone() for name, tensor in model.named_parameters()}
            change(model)
    load(path, model=model)
    for name, tensor in model.named_parameters():
        assert torch.equal(tensor, saved[name]) == ("lora_" in name), name


def test_saving_leaves_the_model_and_safetensors_as_they_were(root: Path, tmp_path: Path):
    """The reading replaces safetensors' writer for its own thread and moment only; the model's state is not touched."""
    model = build("GPT2, tied")
    before = {name: (tensor.data_ptr(), tensor.clone()) for name, tensor in model.state_dict().items()}
    with AsyncCheckpointer(root, writer="thread") as checkpointer:
        checkpointer.save(1, model=model).result(BOUND)
    for name, tensor in model.state_dict().items():
        assert (tensor.data_ptr(), True) == (before[name][0], torch.equal(tensor, before[name][1]))
    safetensors.torch.save_file({"a": torch.arange(3)}, tmp_path / "a.safetensors")
    assert safetensors.torch.load_file(tmp_path / "a.safetensors")["a"].tolist() == [0, 1, 2]


# -- modules that are no model of transformers


class Plain(torch.nn.Module):
    """A tie, a view, strides of every kind, and buffers that are kept and that are not."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(12)
        self.first = torch.nn.Linear(6, 6)
        self.tied = torch.nn.Linear(6, 6)
        self.tied.weight = self.first.weight
        self.convolution = torch.nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
        self.transposed = torch.nn.Parameter(torch.randn(5, 3).t())
        self.bf16 = torch.nn.Parameter(torch.randn(3).bfloat16())
        self.scalar = torch.nn.Parameter(torch.tensor(3.0))
        self.nothing = torch.nn.Parameter(torch.empty(0, 4))
        self.register_buffer("view", self.first.weight.data[2:4])
        self.register_buffer("numbers", torch.arange(5))
        self.register_buffer("wave", torch.randn(3, dtype=torch.complex64).conj())
        self.register_buffer("scratch", torch.randn(7), persistent=False)
        self.register_parameter("absent", None)


def plain_image(module: torch.nn.Module) -> bytes:
    """The weights file of a plain module: its state_dict as safetensors writes it, of a tie the first name."""
    kept: dict[str, torch.Tensor] = {}
    seen = set()
    for name, tensor in module.state_dict().items():
        identity = (tensor.data_ptr(), tensor.shape, tensor.stride())
        if tensor.numel() and identity in seen:
            continue
        seen.add(identity)
        kept[name] = tensor.resolve_conj().clone(memory_format=torch.contiguous_format)
    return safetensors.torch.save(kept, {"format": "pt"})


@pytest.mark.parametrize("staging", ["overlap", "blocking"])
def test_a_plain_module_is_one_safetensors_file_of_its_state_dict(root: Path, staging: Any):
    """Ties once, strides made contiguous, conjugates resolved, non-persistent buffers left out; and load gives it back."""
    module = Plain()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    optimizer.step()
    with AsyncCheckpointer(root, writer="thread", staging=staging) as checkpointer:
        for step in (1, 2):
            expected, state = plain_image(module), copy.deepcopy(module.state_dict())
            path = checkpointer.save(step, model=module, optimizer=optimizer).result(BOUND).path
            assert (path / "model.safetensors").read_bytes() == expected
            assert {"first.weight", "view"} <= set(safetensors.torch.load(expected))
            assert not {"tied.weight", "scratch"} & set(safetensors.torch.load(expected))
            module.bf16.data.mul_(2)
            module.transposed.data.add_(1)
    module.bf16.data.zero_()
    load(path, model=module)
    assert all(torch.equal(tensor, state[name]) for name, tensor in module.state_dict().items())


def test_an_expanded_buffer_is_written_out(root: Path):
    """Stride 0 is a stride like any other; and loaded into one, each place is filled once."""
    module = torch.nn.Module()
    module.register_buffer("mask", torch.ones(1, 3).expand(4, 3))
    with AsyncCheckpointer(root, writer="thread") as checkpointer:
        path = checkpointer.save(1, model=module).result(BOUND).path
    assert (path / "model.safetensors").read_bytes() == plain_image(module)
    fresh = torch.nn.Module()
    fresh.register_buffer("mask", torch.zeros(1, 3).expand(4, 3))
    load(path, model=fresh)
    assert torch.equal(fresh.mask, module.mask)


@pytest.mark.parametrize(
    "wrap", [torch.nn.DataParallel, torch.compile, lambda m: torch.compile(torch.nn.DataParallel(m))],
    ids=["DataParallel", "compile", "both"],
)  # fmt: skip
def test_wrappers_are_seen_through(root: Path, wrap: Callable[[Any], Any]):
    """Names on disk are those of the module inside, whoever wraps it."""
    module = torch.nn.Linear(3, 3)
    with AsyncCheckpointer(root, writer="thread") as checkpointer:
        path = checkpointer.save(1, model=wrap(module)).result(BOUND).path
    assert (path / "model.safetensors").read_bytes() == plain_image(module)


class WithState(torch.nn.Linear):
    def get_extra_state(self) -> Any:
        return {"calls": 3}

    def set_extra_state(self, state: Any) -> None:
        pass


def with_parameter(tensor: torch.Tensor) -> torch.nn.Module:
    module = torch.nn.Module()
    module.odd = torch.nn.Parameter(tensor, requires_grad=False)
    return module


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor", "ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (lambda: WithState(2, 2), "_extra_state.*extra="),
        (lambda: torch.nn.Linear(2, 2, device="meta"), "weight.*meta device"),
        (lambda: with_parameter(torch.eye(3).to_sparse()), "odd.*sparse"),
        (lambda: with_parameter(torch.eye(3, dtype=torch.complex128)), "odd.*complex128"),
        (lambda: with_parameter(torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])), "odd.*nested"),
        (lambda: with_parameter(torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8)), "odd.*quantized"),
        (lambda: [torch.nn.Linear(2, 2)], "a list is given; use a mapping"),
        (lambda: {"../up": torch.nn.Linear(2, 2)}, r"\.\./up"),
        (lambda: {"a/b": torch.nn.Linear(2, 2)}, "a/b"),
        (lambda: {"_vembed_async_ckpt": torch.nn.Linear(2, 2)}, "_vembed"),
        (lambda: {3: torch.nn.Linear(2, 2)}, "3"),
    ],
    ids=["extra_state", "meta", "sparse", "complex128", "nested", "quantized", "list", "up", "slash", "work", "number"],
)
def test_what_cannot_be_saved_is_refused_before_anything_is_touched(root: Path, model: Callable[[], Any], reason: str):
    """A PlanError naming the tensor, from save() itself; the next save works."""
    with AsyncCheckpointer(root, writer="thread") as checkpointer:
        with pytest.raises(PlanError, match=reason):
            checkpointer.save(1, model=model())
        assert checkpointer.statistics()["started"] == 0
        checkpointer.save(1, model=torch.nn.Linear(2, 2)).result(BOUND)


def test_a_nested_config_that_was_edited_is_saved_as_it_is(root: Path, tmp_path: Path):
    """Also what stands deeper in a config is looked at before a known plan is used."""
    model = build("CLIP")
    with AsyncCheckpointer(root, writer="thread") as checkpointer:
        checkpointer.save(1, model=model).result(BOUND)
        model.config.text_config.hidden_act = "relu"
        path = checkpointer.save(2, model=model).result(BOUND).path
    assert files(path) == stock(model, tmp_path / "stock")
    assert json.loads((path / "config.json").read_bytes())["text_config"]["hidden_act"] == "relu"


def test_a_meta_tensor_after_a_good_save_is_refused_too(root: Path):
    """The known plan of a model is not enough: where its tensors live now is looked at."""
    module = torch.nn.Linear(2, 2)
    with AsyncCheckpointer(root, writer="thread") as checkpointer:
        checkpointer.save(1, model=module).result(BOUND)
        module.to("meta")
        with pytest.raises(PlanError, match="meta"):
            checkpointer.save(2, model=module)


# -- a known plan, and what makes it wrong


def replaced_child(model: Any) -> None:
    model.encoder.layer[1] = copy.deepcopy(model.encoder.layer[1])
    change(model.encoder.layer[1])


def removed_child(model: Any) -> None:
    del model.encoder.layer[1]


def replaced_parameter(model: Any) -> None:
    model.encoder.layer[0].output.dense.weight = torch.nn.Parameter(torch.ones(16, 24))


def resized_embeddings(model: Any) -> None:
    model.resize_token_embeddings(44)


def to_bfloat16(model: Any) -> None:
    model.to(torch.bfloat16)


def new_data(model: Any) -> None:
    for parameter in model.parameters():
        parameter.data = torch.full_like(parameter, 2.0)


def new_strides(model: Any) -> None:
    for parameter in model.parameters():
        if parameter.ndim == 2:
            parameter.data = parameter.data.t().contiguous().t()


def swapped_data(model: Any) -> None:
    one, other = model.encoder.layer[0].output.dense.weight, model.encoder.layer[1].output.dense.weight
    one.data, other.data = other.data, one.data


def new_buffer(model: Any) -> None:
    model.encoder.register_buffer("counts", torch.arange(9))


def edited_config(model: Any) -> None:
    model.config.hidden_dropout_prob = 0.25


def edited_labels(model: Any) -> None:
    model.config.id2label[0] = "yes"


HF_CHANGES = [
    replaced_child, removed_child, replaced_parameter, resized_embeddings, to_bfloat16, new_data, new_strides, swapped_data,
    new_buffer, edited_config, edited_labels,
]  # fmt: skip


@pytest.mark.parametrize("edit", HF_CHANGES, ids=lambda edit: edit.__name__)
def test_the_save_after_a_change_is_right(root: Path, tmp_path: Path, edit: Callable[[Any], None]):
    """Structure, identity, storage, dtype, config: the second save equals save_pretrained of the changed model."""
    model = build("Bert")
    with AsyncCheckpointer(root, writer="thread") as checkpointer:
        first = files(checkpointer.save(1, model=model).result(BOUND).path)
        edit(model)
        expected = stock(model, tmp_path / "stock")
        if edit is not new_strides:
            assert expected != first, "the edit shows"
        assert files(checkpointer.save(2, model=model).result(BOUND).path) == expected
        change(model)
        assert files(checkpointer.save(3, model=model).result(BOUND).path) == stock(model, tmp_path / "again")


def untied(module: Any) -> None:
    module.tied.weight = torch.nn.Parameter(module.first.weight.detach() + 1)


def tied_again(module: Any) -> None:
    module.convolution.bias = torch.nn.Parameter(torch.randn(4))


def buffer_gone(module: Any) -> None:
    del module.numbers


def none_becomes_parameter(module: Any) -> None:
    module.absent = torch.nn.Parameter(torch.ones(2))


def parameter_becomes_none(module: Any) -> None:
    module.transposed = None


def buffer_becomes_persistent(module: Any) -> None:
    module._non_persistent_buffers_set.discard("scratch")


def buffer_rebound(module: Any) -> None:
    module.numbers = torch.arange(5) * 2


def narrowed(module: Any) -> None:
    module.first.bias.data = module.first.bias.data.half()


PLAIN_CHANGES = [
    narrowed, untied, tied_again, buffer_gone, none_becomes_parameter, parameter_becomes_none, buffer_becomes_persistent,
    buffer_rebound, to_bfloat16, new_data,
]  # fmt: skip


@pytest.mark.parametrize("edit", PLAIN_CHANGES, ids=lambda edit: edit.__name__)
def test_the_save_after_a_change_of_a_plain_module_is_right(root: Path, edit: Callable[[Any], None]):
    """Names that come, go, are tied or part: the second save is the state_dict as it is then."""
    module = Plain()
    del module.wave  # .to(bfloat16) would drop its imaginary part
    with AsyncCheckpointer(root, writer="thread") as checkpointer:
        first = checkpointer.save(1, model=module).result(BOUND).path / "model.safetensors"
        edit(module)
        expected = plain_image(module)
        assert first.read_bytes() != expected, "the edit shows"
        second = checkpointer.save(2, model=module).result(BOUND).path / "model.safetensors"
        assert second.read_bytes() == expected


def filtered(self: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
    whole = torch.nn.Module.state_dict(self, *args, **kwargs)
    return whole if self.everything else {name: value for name, value in whole.items() if name not in self._parameters}


def without_parameters(self: Any, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
    torch.nn.Module._save_to_state_dict(self, destination, prefix, keep_vars)
    for name in () if self.everything else self._parameters:
        del destination[prefix + name]


OWN_METHODS = {"state_dict": filtered, "_save_to_state_dict": without_parameters}


@pytest.mark.parametrize("family", ["plain", "CLIP"])
@pytest.mark.parametrize("name", OWN_METHODS)
def test_a_method_of_a_class_that_decides_anew_is_asked_for_every_save(root: Path, name: str, family: str):
    """What a class has in the place of torch's own method goes by a flag: each save has what it gives at that call."""
    model = torch.nn.Linear(3, 4) if family == "plain" else build(family)
    model.__class__ = type("Own", (type(model),), {name: OWN_METHODS[name]})
    with AsyncCheckpointer(root, writer="thread") as checkpointer:
        for step, everything in enumerate([False, True, False]):
            model.everything = everything
            path = checkpointer.save(step, model=model).result(BOUND).path / "model.safetensors"
            assert safetensors.torch.load_file(path).keys() == model.state_dict().keys()


class TwoNames(torch.nn.Module):
    """Two parameters that share memory without being one object."""

    def __init__(self) -> None:
        super().__init__()
        self.a = torch.nn.Parameter(torch.arange(6.0))
        self.b = torch.nn.Parameter(self.a.data)


def test_a_tie_broken_through_data_is_noticed(root: Path):
    """The objects stay the same, their memory parts: both are stored, and both come back."""
    module = TwoNames()
    with AsyncCheckpointer(root, writer="thread") as checkpointer:
        first = checkpointer.save(1, model=module).result(BOUND).path
        assert set(safetensors.torch.load_file(first / "model.safetensors")) == {"a"}
        module.b.data = torch.full((6,), 9.0)
        second = checkpointer.save(2, model=module).result(BOUND).path
    assert {name: t[0].item() for name, t in safetensors.torch.load_file(second / "model.safetensors").items()} == {
        "a": 0.0,
        "b": 9.0,
    }
    fresh = TwoNames()
    load(first, model=fresh)
    assert torch.equal(fresh.b, torch.arange(6.0))


class Fused(torch.nn.Module):
    """Its state_dict shows the parts of one fused parameter, as some models' hooks do."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = torch.nn.Parameter(torch.randn(6, 4))
        self.register_state_dict_post_hook(self.split)

    @staticmethod
    def split(module: Any, state: dict[str, torch.Tensor], prefix: str, local_metadata: Any) -> None:
        state[prefix + "q"], state[prefix + "kv"] = state.pop(prefix + "qkv").split([2, 4])


def test_parts_of_a_parameter_follow_its_strides(root: Path):
    """A part is found by strides and offset; when `.data` brings other strides it is found anew."""
    module = Fused()
    with AsyncCheckpointer(root, writer="thread") as checkpointer:
        for step, edit in enumerate((change, new_data, new_strides, change)):
            expected = plain_image(module)
            path = checkpointer.save(step, model=module).result(BOUND).path
            assert (path / "model.safetensors").read_bytes() == expected, step
            edit(module)
            module.qkv.data.copy_(torch.randn(6, 4))
        module.qkv.data = module.qkv.data.contiguous()
        state = module.qkv.detach().clone()
        path = checkpointer.save(9, model=module).result(BOUND).path
    change(module)
    load(path, model=module)
    assert torch.equal(module.qkv, state)


def test_another_model_under_the_same_name_is_read_anew(root: Path):
    """A checkpointer is not married to the first model it saw."""
    one, other = Plain(), Plain()
    change(other)
    with AsyncCheckpointer(root, writer="thread") as checkpointer:
        for step, module in enumerate((one, other, one)):
            path = checkpointer.save(step, model=module).result(BOUND).path
            assert (path / "model.safetensors").read_bytes() == plain_image(module)


def test_a_module_that_gives_up_a_tie_s_alias_is_described_anew(root: Path):
    """The file keeps its bytes, the manifest does not keep the alias: a model with that name is told what is missing."""
    module = TwoNames()
    with AsyncCheckpointer(root, writer="thread") as checkpointer:
        checkpointer.save(1, model=module).result(BOUND)
        del module.b
        path = checkpointer.save(2, model=module).result(BOUND).path
    assert json.loads((path / names.MANIFEST).read_bytes())["names"][""]["ties"] == {}
