"""What trains beside a save: a transformer made up for it, or the user's own model."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from .models import loss_of


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

    def __init__(
        self, model: torch.nn.Module, optimizer: torch.optim.Optimizer, inputs: dict[str, torch.Tensor]
    ) -> None:
        self.model = model  # type: ignore[assignment]
        self.optimizer = optimizer
        self.inputs = inputs
        self.input = next(iter(inputs.values()))

    def loss(self) -> torch.Tensor:
        return loss_of(self.model(**self.inputs))
