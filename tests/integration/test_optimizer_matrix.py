"""Every optimizer, flag, memory format and dtype: a resumed run is the uninterrupted one, to the last bit.

Each case trains three steps, is saved, and trains four more. From the checkpoint it goes on twice: as our `load` restores it, and
as torch reads the same `optimizer.bin` and safetensors the same weights. The first must be the uninterrupted run, the second what
`torch.save` of the state_dict gives; where these differ, the optimizer is in `OWN` with the reason. One test has each pair of an
optimizer with a memory format, the dtypes taking turns; the slow one has all combinations.
"""

from __future__ import annotations

import contextlib
import inspect
import io
import itertools
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_optimizer
import schedulefree
import torch
import transformers
from safetensors.torch import load_file

from vembed_async_ckpt import AsyncCheckpointer, load

pytestmark = pytest.mark.filterwarnings("ignore:.*")  # of optimizers that are given what they were not made for
BOUND = 120
BEFORE, AFTER = 3, 4
DTYPES = (torch.float32, torch.bfloat16, torch.float64, torch.complex64)

# What torch's own load_state_dict does not bring back: it casts floating point state to the dtype of the parameter.
OWN: dict[str, str] = {
    "NAdam": "mu_product is float32, and becomes float64 with the parameter",
    "nadam": "mu_product is float32, and becomes float64 with the parameter",
    "qhadam": "beta1_weight and beta2_weight are float32, and become what the parameter is",
    "hf.Adafactor": "exp_avg_sq_row, exp_avg_sq_col and RMS are float32, and become what the parameter is",
    "kron": "the factors in Q are float32, and become what the parameter is",
}
# Optimizers whose state holds code, which save() refuses by name (see test_values).
REFUSED = {"conda", "scalableshampoo"}


def flat_views() -> list[torch.Tensor]:
    flat = torch.randn(64)
    return [flat[3:23].view(4, 5), flat[23:38].view(3, 5)]


LAYOUTS: dict[str, Callable[[], list[torch.Tensor]]] = {
    "contiguous": lambda: [torch.randn(4, 3, 3, 3)],
    "channels_last": lambda: [torch.randn(4, 3, 3, 3).to(memory_format=torch.channels_last)],
    "channels_last_3d": lambda: [torch.randn(4, 3, 2, 2, 2).to(memory_format=torch.channels_last_3d)],
    "transposed": lambda: [torch.randn(6, 5).T],
    "part_of_a_buffer": flat_views,
    "scalar": lambda: [torch.randn(())],
    "empty": lambda: [torch.randn(0, 5)],
}


class Holder(torch.nn.Module):
    def __init__(self, layout: str, dtype: torch.dtype, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        made = LAYOUTS[layout]()
        flat = torch.empty(64, dtype=dtype)
        for number, tensor in enumerate(made):
            if layout == "part_of_a_buffer":
                place = flat.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())
            else:
                place = torch.empty_like(tensor, dtype=dtype)
            self.register_parameter(f"p{number}", torch.nn.Parameter(place.copy_(tensor)))


@dataclass(frozen=True)
class Variant:
    """An optimizer with its flags."""

    name: str
    kind: Any
    options: tuple[tuple[str, Any], ...]

    def __str__(self) -> str:
        return " ".join([self.name, *(f"{key}={value}" for key, value in self.options)])


Case = tuple[Variant, str, torch.dtype]
FORMS: tuple[Callable[[list[Any]], Any], ...] = (
    lambda parameters: parameters,
    lambda parameters: [{"params": parameters, "use_muon": True}],
)
ARGUMENTS: tuple[dict[str, Any], ...] = (
    {"lr": 1e-2}, {}, {"lr": 1e-2, "num_iterations": 100}, {"num_data": 8}, {"max_lr": 1e-2},
)  # fmt: skip
HESSIAN = {"adahessian", "sophiah"}


def make(variant: Variant, holder: Holder) -> Any:
    last: Exception | None = None
    for form, arguments in itertools.product(FORMS, ARGUMENTS):
        try:
            optimizer = variant.kind(form(list(holder.parameters())), **arguments, **dict(variant.options))
        except (TypeError, ValueError, KeyError, AssertionError, AttributeError) as error:
            last = error
            continue
        if hasattr(optimizer, "train"):
            optimizer.train()
        return optimizer
    raise last or AssertionError


def train(variant: Variant, holder: Holder, optimizer: Any, steps: range) -> None:
    torch.manual_seed(steps.start)
    np.random.seed(steps.start)
    random.seed(steps.start)
    for step in steps:

        def closure(step: int = step) -> torch.Tensor:
            generator = torch.Generator().manual_seed(step)
            loss = torch.zeros(())
            for parameter in holder.parameters():
                noise = torch.randn(parameter.shape, generator=generator)
                if variant.name in HESSIAN:
                    parameter.grad = None
                    loss = loss + ((parameter.real * noise).pow(2) * parameter.real.pow(2)).sum()
                else:
                    parameter.grad = torch.empty_like(parameter).copy_(noise)
                    if variant.name == "SparseAdam":
                        parameter.grad = parameter.grad.to_sparse()
            if variant.name in HESSIAN:
                loss.backward(create_graph=True)
            return loss + 1

        closure()
        try:
            optimizer.step()
        except TypeError:
            optimizer.step(closure)


def flagged(name: str, kind: Any, flags: Sequence[dict[str, Any]]) -> Iterator[Variant]:
    accepted = inspect.signature(kind).parameters
    base = {"momentum": 0.9} if name in ("SGD", "RMSprop") else {}
    for chosen in flags:
        if chosen.keys() <= accepted.keys():
            yield Variant(name, kind, tuple({**base, **chosen}.items()))


TORCH_FLAGS: list[dict[str, Any]] = [
    {}, {"fused": True}, {"foreach": True}, {"foreach": False}, {"amsgrad": True}, {"maximize": True}, {"capturable": True},
    {"fused": True, "amsgrad": True}, {"fused": True, "maximize": True}, {"foreach": True, "amsgrad": True},
    {"weight_decay": 0.1}, {"nesterov": True}, {"centered": True}, {"differentiable": True},
]  # fmt: skip
OTHER_FLAGS: list[dict[str, Any]] = [{}, {"maximize": True}, {"foreach": True}, {"amsgrad": True}]


def of_torch() -> list[Variant]:
    kinds = {name: kind for name, kind in vars(torch.optim).items() if isinstance(kind, type)}
    return [
        variant
        for name, kind in sorted(kinds.items())
        if issubclass(kind, torch.optim.Optimizer) and kind is not torch.optim.Optimizer
        for variant in flagged(name, kind, TORCH_FLAGS)
    ]


def of_others() -> list[Variant]:
    kinds: dict[str, Any] = {}
    for name in pytorch_optimizer.get_supported_optimizers():
        with contextlib.suppress(ImportError, ValueError):  # of those that need a package that is not here
            kinds[name] = pytorch_optimizer.load_optimizer(name)
    kinds["hf.Adafactor"] = transformers.Adafactor
    kinds |= {
        f"schedulefree.{name}": getattr(schedulefree, name)
        for name in ("AdamWScheduleFree", "SGDScheduleFree", "RAdamScheduleFree")
    }
    flags = [v for name, kind in sorted(kinds.items()) if name not in REFUSED for v in flagged(name, kind, OTHER_FLAGS)]
    wrapped = (("Lookahead", pytorch_optimizer.Lookahead), ("OrthoGrad", pytorch_optimizer.OrthoGrad))
    return flags + [
        Variant(f"{name}(AdamW)", _Wrapping(kind, fused), (("fused", fused),))
        for name, kind in wrapped
        for fused in (True, False)
    ]


@dataclass(frozen=True)
class _Wrapping:
    kind: Any
    fused: bool

    def __call__(self, parameters: Any, lr: float, fused: bool) -> Any:
        return self.kind(torch.optim.AdamW(parameters, lr=lr, fused=fused))


def pairs(variants: Sequence[Variant]) -> Iterator[list[Case]]:
    """For each optimizer with each memory format the dtypes in turn, the first that it trains in to be taken."""
    for number, variant in enumerate(variants):
        for place, layout in enumerate(LAYOUTS):
            start = number + place
            yield [(variant, layout, DTYPES[(start + turn) % len(DTYPES)]) for turn in range(len(DTYPES))]


@dataclass
class Trained:
    """A case at the moment of its save, and what it must become. `own`: whether the state_dict by itself brings it there."""

    case: Case
    holder: Holder
    optimizer: Any
    expected: list[bytes]
    own: list[bytes] | str


def weights(holder: Holder) -> list[bytes]:
    return [p.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() for p in holder.parameters()]


def trained(case: Case) -> Trained | None:
    """None if this optimizer does not train such parameters."""
    variant, layout, dtype = case
    try:
        holder = Holder(layout, dtype, 0)
        optimizer = make(variant, holder)
        train(variant, holder, optimizer, range(BEFORE))
        state = io.BytesIO()
        torch.save((holder.state_dict(), optimizer.state_dict()), state)
        train(variant, holder, optimizer, range(BEFORE, BEFORE + AFTER))
        expected = weights(holder)
        # Again, to stand where it is saved: and whether the training by itself is the same when it is repeated.
        holder = Holder(layout, dtype, 0)
        optimizer = make(variant, holder)
        train(variant, holder, optimizer, range(BEFORE))
    except Exception:  # whatever an optimizer says of what it was not made for
        return None

    def restore(other: Holder, fresh: Any) -> None:
        state.seek(0)
        of_model, of_optimizer = torch.load(state, weights_only=False)
        other.load_state_dict(of_model)
        fresh.load_state_dict(of_optimizer)

    return Trained(case, holder, optimizer, expected, resumed(case, restore))


def resumed(case: Case, restore: Callable[[Holder, Any], None]) -> list[bytes] | str:
    variant, layout, dtype = case
    try:
        holder = Holder(layout, dtype, 1)
        optimizer = make(variant, holder)
        restore(holder, optimizer)
        train(variant, holder, optimizer, range(BEFORE, BEFORE + AFTER))
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return weights(holder)


def described(case: Case) -> str:
    return f"{case[0]}, {case[1]}, {case[2]}"


def differences(root: Path, cases: Sequence[Trained]) -> tuple[list[str], set[str]]:
    """Save all of them in one checkpoint and go on from it. Returns what is not as it must be, and the names of optimizers whose
    own state_dict does not bring them back."""
    numbered = {f"case-{number}": each for number, each in enumerate(cases)}
    with AsyncCheckpointer(root, writer="thread") as checkpointer:
        path = (
            checkpointer.save(
                1,
                model={name: each.holder for name, each in numbered.items()},
                optimizer={name: each.optimizer for name, each in numbered.items()},
            )
            .result(BOUND)
            .path
        )
    wrong: list[str] = []
    own: set[str] = set()
    for number, (name, each) in enumerate(numbered.items()):

        def ours(holder: Holder, optimizer: Any, name: str = name) -> None:
            load(path, model={name: holder}, optimizer={name: optimizer}, verify="none")

        def stock(holder: Holder, optimizer: Any, name: str = name, number: int = number) -> None:
            holder.load_state_dict(load_file(path / name / "model.safetensors"))
            file = f"optimizer_{number}.bin" if number else "optimizer.bin"
            optimizer.load_state_dict(torch.load(path / file, weights_only=False))

        variant = each.case[0]
        if each.own != each.expected:
            own.add(variant.name)
        for reader, restore, right in (("load", ours, each.expected), ("torch.load", stock, each.own)):
            found = resumed(each.case, restore)
            if found != right:
                wrong.append(f"{described(each.case)}: after {reader} it is not the same: {str(found)[:80]}")
    return wrong, own


def run(root: Path, wanted: Sequence[Sequence[Case]], chunk: int = 24) -> tuple[int, list[str], set[str]]:
    """Of each sequence of cases the first that trains. Returns their number, and what `differences` says of all."""
    cases = [
        found for cases in wanted for found in [next(filter(None, map(trained, cases)), None)] if found is not None
    ]
    wrong, own = [], set()
    for number, start in enumerate(range(0, len(cases), chunk)):
        more, of_these = differences(root / str(number), cases[start : start + chunk])
        wrong += more
        own |= of_these
    return len(cases), wrong, own


FAMILIES = {"torch": of_torch, "others": of_others}


@pytest.mark.timeout(900)  # about two minutes of one core
@pytest.mark.parametrize("family", FAMILIES)
def test_a_resumed_run_is_the_uninterrupted_one(tmp_path: Path, family: str, record_property: Any):
    """Each optimizer with each memory format; the dtypes take turns."""
    variants = FAMILIES[family]()
    count, wrong, own = run(tmp_path, list(pairs(variants)))
    record_property("cases", count)
    print(f"{family}: {count} cases of {len(variants)} optimizers with flags")
    assert wrong == []
    assert own <= OWN.keys()
    assert count >= {"torch": 500, "others": 1800}[family]


@pytest.mark.slow
@pytest.mark.timeout(5400)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_combination(tmp_path: Path, family: str, dtype: torch.dtype):
    """The full product."""
    variants = FAMILIES[family]()
    count, wrong, own = run(tmp_path, [[(v, layout, dtype)] for v in variants for layout in LAYOUTS])
    print(f"{family}, {dtype}: {count} cases, of which the optimizer's own fault: {sorted(own)}")
    assert wrong == []
    assert own <= OWN.keys()
    assert count >= 100


def test_every_reason_is_still_true(tmp_path: Path):
    """What is said not to be brought back by torch is not, and is by our load."""
    variants = [variant for variant in (*of_torch(), *of_others()) if variant.name in OWN and len(variant.options) == 0]
    _, wrong, own = run(tmp_path, [[case] for cases in pairs(variants) for case in cases])
    assert wrong == []
    assert own == OWN.keys()
