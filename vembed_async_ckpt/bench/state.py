"""What is saved, and the training beside it: made up to size, or the user's own model."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from .options import Options, Refused


@dataclass(frozen=True)
class StateSpec:
    """How to build the state, in any process. `model` is a config.json, a directory or a hub id; None is a plain module of
    `tensors` tensors of together `size` bytes, AdamW's moments among them."""

    size: int
    tensors: int
    model: str | None
    device: str

    @classmethod
    def of(cls, options: Options) -> StateSpec:
        return cls(options.size, options.tensors, options.model, options.device)

    def build(self) -> State:
        torch.manual_seed(0)
        return Own(self) if self.model else State(self)


class State:
    """A model and the AdamW that has stepped once over it; nothing about it changes until somebody trains it.

    `step()` is an optimizer step that finds no gradients: it passes through torch's hooks as any does and changes nothing.
    """

    def __init__(self, spec: StateSpec) -> None:
        self.device = torch.device(spec.device)
        self.model = self._model(spec).to(self.device)
        self.optimizer = torch.optim.AdamW([p for p in self.model.parameters() if p.requires_grad], lr=1e-4)
        for parameter in self.model.parameters():
            if parameter.requires_grad:
                parameter.grad = torch.full_like(parameter, 1e-3)
        self.step()
        self.optimizer.zero_grad()

    def _model(self, spec: StateSpec) -> torch.nn.Module:
        weights = max(1, spec.tensors // 3)
        elements = max(1, spec.size // 3 // weights // 4)
        shape = (elements // 1024, 1024) if elements >= 1024 else (elements,)
        module = torch.nn.Module()
        block = torch.rand(shape)
        for number in range(weights):
            module.register_parameter(f"weight{number:05}", torch.nn.Parameter(block + number))
        return module

    def step(self) -> None:
        self.optimizer.step()

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
        return OwnTraining(self, inputs)


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
            _loss(model(**inputs)).backward()  # type: ignore[no-untyped-call]
        except Exception:
            continue  # not what this model takes
        finally:
            model.zero_grad()
        return inputs
    return None


def _loss(output: Any) -> torch.Tensor:
    values = output.values() if hasattr(output, "values") else output if isinstance(output, tuple) else [output]
    for value in values:
        if isinstance(value, torch.Tensor) and value.is_floating_point() and value.requires_grad:
            return value.pow(2).mean()
    raise ValueError("no output to train on")


class Training:
    """A transformer that keeps the processor busy the way training does."""

    own = False

    def __init__(self, width: int, layers: int, batch: int, device: torch.device) -> None:
        layer = torch.nn.TransformerEncoderLayer(width, max(1, width // 64), 4 * width, batch_first=True)
        self.model = torch.nn.TransformerEncoder(layer, layers, enable_nested_tensor=False).to(device)
        self.optimizer: torch.optim.Optimizer = torch.optim.SGD(self.model.parameters(), lr=1e-4)
        self.input = torch.rand(batch, 64, width, device=device)

    def loss(self) -> torch.Tensor:
        return self.model(self.input).pow(2).mean()  # type: ignore[no-any-return]

    def stretch(self) -> float:
        """Forward and backward; returns the seconds."""
        begun = time.perf_counter()
        self.loss().backward()  # type: ignore[no-untyped-call]
        if self.input.is_cuda:
            torch.cuda.synchronize()
        taken = time.perf_counter() - begun
        self.optimizer.zero_grad()
        return taken

    def step(self, barrier: Callable[[], object] = lambda: None) -> float:
        """A whole training step, with an optimizer that changes the weights; returns the seconds."""
        begun = time.perf_counter()
        self.loss().backward()  # type: ignore[no-untyped-call]
        barrier()
        self.optimizer.step()
        if self.input.is_cuda:
            torch.cuda.synchronize()
        taken = time.perf_counter() - begun
        self.optimizer.zero_grad()
        return taken


class OwnTraining(Training):
    """The user's model, trained by its own optimizer: what is saved is what is trained."""

    own = True

    def __init__(self, state: State, inputs: dict[str, torch.Tensor]) -> None:
        self.model = state.model  # type: ignore[assignment]
        self.optimizer = state.optimizer
        self.inputs = inputs
        self.input = next(iter(inputs.values()))

    def loss(self) -> torch.Tensor:
        return _loss(self.model(**self.inputs))


def lasting(state: State, seconds: float, width: int) -> int:
    """The batch with which the training of this state takes about `seconds` for forward and backward."""
    trial = state.training(2, width)
    trial.stretch()
    return max(1, round(2 * seconds / min(trial.stretch() for _ in range(3))))
