"""What is saved: a well-known workload, so many equal tensors, or the user's own model, with AdamW's moments.

Values are random, and `drift()` changes every one of them before each save: an engine that compresses, or that writes only
what has changed, finds as little to leave out as in a training.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch

from .models import guess_inputs, pretrained
from .options import Options
from .training import OwnTraining, Training
from .workloads import WORKLOADS, Weight

CHUNK = 32 << 20  # bytes of gradients that exist at a time


@dataclass(frozen=True)
class StateSpec:
    """How to build the state, in any process: `model` (a config.json, a directory or a hub id), else `tensors` equal ones
    of together
    `size` bytes with AdamW's moments among them, else `workload` at `scale`."""

    device: str
    workload: str
    scale: str
    size: int | None = None
    tensors: int = 300
    model: str | None = None

    @classmethod
    def of(cls, options: Options) -> StateSpec:
        return cls(options.device, options.workload, options.scale, options.size, options.tensors, options.model)

    def build(self) -> State:
        torch.manual_seed(0)
        return Own(self) if self.model else State(self)

    def weights(self) -> list[Weight]:
        """Of a state that is made up."""
        if self.size is None:
            return WORKLOADS[self.workload].tensors(Fraction(self.scale))
        count = max(1, self.tensors // 3)
        elements = max(1, self.size // 3 // count // 4)
        shape = (elements // 1024, 1024) if elements >= 1024 else (elements,)
        return [Weight(f"weight{number:05}", shape) for number in range(count)]


class State:
    """A model and its AdamW. Nothing about it changes but by `drift()` and by whoever trains it.

    `step()` is an optimizer step that finds no gradients: it passes through torch's hooks as any does and changes nothing.
    """

    def __init__(self, spec: StateSpec) -> None:
        self.device = torch.device(spec.device)
        self._untrained: list[torch.Tensor] = []  # that change all the same
        self.model = self._model(spec).to(self.device)
        self.optimizer = torch.optim.AdamW([p for p in self.model.parameters() if p.requires_grad], lr=1e-4)
        self.drift()

    def _model(self, spec: StateSpec) -> torch.nn.Module:
        module = torch.nn.Module()
        for weight in spec.weights():
            values = torch.randn(weight.shape, device=self.device).mul_(0.02)
            parameter = torch.nn.Parameter(values.half() if weight.half else values, requires_grad=weight.trained)
            module.register_parameter(weight.name.replace(".", "_"), parameter)
            if not weight.trained:
                self._untrained.append(parameter)
        return module

    def step(self) -> None:
        self.optimizer.step()

    def drift(self) -> None:
        """Optimizer steps over random gradients, each weight in one of them: weights and moments change as in a training.

        Weights that no optimizer trains but that belong to the training (fp16 copies) get small random changes.
        """
        for group in self._groups():
            for parameter in group:
                parameter.grad = torch.randn_like(parameter).mul_(1e-3)
            self.optimizer.step()
            self.optimizer.zero_grad()
        with torch.no_grad():
            for tensor in self._untrained:
                tensor.add_(torch.randn_like(tensor), alpha=1e-4)
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def _groups(self) -> Iterator[list[torch.nn.Parameter]]:
        """The trained weights, about `CHUNK` bytes at a time, so that little more memory is taken than between two steps."""
        group: list[torch.nn.Parameter] = []
        size = 0
        for parameter in self.model.parameters():
            if parameter.requires_grad:
                group.append(parameter)
                size += parameter.nbytes
            if size >= CHUNK:
                yield group
                group, size = [], 0
        if group:
            yield group

    def state_dict(self) -> dict[str, Any]:
        """As a training loop hands it to a peer, made anew for each save."""
        return {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}

    def flat(self) -> dict[str, torch.Tensor]:
        """Every tensor by a name of its own, the model's own among them."""
        found = dict(self.model.state_dict())
        names = {id(parameter): name for name, parameter in self.model.named_parameters()}
        for parameter, moments in self.optimizer.state.items():
            for kind, value in moments.items():
                if isinstance(value, torch.Tensor):
                    found[f"optimizer.{names[id(parameter)]}.{kind}"] = value
        return found

    def distinct(self) -> list[torch.Tensor]:
        """Every tensor, tied ones once."""
        return list({tensor.data_ptr() or id(tensor): tensor.detach() for tensor in self.flat().values()}.values())

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.distinct())

    def training(self, batch: int, width: int, layers: int = 6) -> Training:
        """What keeps the processor busy beside a save; here a transformer whose weights are not what is saved."""
        return Training(width, layers, batch, self.device)


class Own(State):
    """A transformers model of the user's, trained on random input if a forward pass of it can be guessed."""

    def _model(self, spec: StateSpec) -> torch.nn.Module:
        assert spec.model is not None
        return pretrained(spec.model)

    def training(self, batch: int, width: int, layers: int = 6) -> Training:
        inputs = guess_inputs(self.model, batch)
        if inputs is None:
            return super().training(batch, width, layers)
        return OwnTraining(self.model, self.optimizer, inputs)


def lasting(state: State, seconds: float, width: int) -> int:
    """The batch with which the training of this state takes about `seconds` for forward and backward."""
    trial = state.training(2, width)
    trial.stretch()
    return max(1, round(2 * seconds / min(trial.stretch() for _ in range(3))))
