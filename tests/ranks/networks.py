"""A small network of odd sizes, a training of it, and the ways to divide it among ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

WIDTH, WORDS = 10, 23


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 16), nn.Linear(16, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.relu(self.up(self.norm(x))))


class Net(nn.Module):
    """The weights of `embed` and `head` are one tensor. `count` and the statistics of `batch` are buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(WORDS, WIDTH)
        self.conv = nn.Conv2d(2, 5, (3, 2))
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.batch = nn.BatchNorm1d(WIDTH)
        self.head = nn.Linear(WIDTH, WORDS, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("count", torch.tensor(3))
        self.register_buffer("scratch", torch.zeros(2), persistent=False)

    def forward(self, words: torch.Tensor) -> torch.Tensor:
        x = self.embed(words).mean(1)
        image = self.conv(x[:, :4].reshape(-1, 1, 2, 2).repeat(1, 2, 2, 1)).flatten(1)  # 2 x 1 of each channel
        x = torch.cat([x[:, :-5], x[:, -5:] + image[:, ::2]], 1)
        for block in self.blocks:
            x = block(x)
        return self.head(self.batch(x))


class Training:
    """A network with AdamW in two groups, and a scheduler. Every rank gets the same batches."""

    def __init__(self, seed: int, wrap: Callable[[Net], Any] = lambda net: net, **options: Any) -> None:
        torch.manual_seed(seed)
        self.net = Net()
        weights = {
            f"{path}.weight" for path, part in self.net.named_modules() if isinstance(part, nn.Linear | nn.Conv2d)
        }
        self.model = wrap(self.net)
        named = {clean(name): parameter for name, parameter in self.model.named_parameters()}
        decayed = [parameter for name, parameter in named.items() if name in weights]
        others = [parameter for name, parameter in named.items() if name not in weights]
        groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=0.05, **options)
        self.scheduler = torch.optim.lr_scheduler.StepLR(self.optimizer, 2)

    def step(self, number: int) -> float:
        words = torch.randint(0, WORDS, (6, 4), generator=torch.Generator().manual_seed(number))
        loss = nn.functional.cross_entropy(self.model(words), words[:, 0])
        loss.backward()
        self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad()
        return float(loss.detach())

    def steps(self, numbers: range) -> list[float]:
        return [self.step(number) for number in numbers]

    def parts(self) -> dict[str, Any]:
        return {"model": self.model, "optimizer": self.optimizer, "scheduler": self.scheduler}


class Large(nn.Module):
    """With the state of AdamW 96 MiB, in tensors of 8 MiB and small ones."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(1448, 1448), nn.Linear(1448, 8)) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return sum(block(x) for block in self.blocks)  # type: ignore[return-value]


class RowScaled(torch.optim.Optimizer):
    """Keeps one number for each row of a weight, so its state has not the shape of the weight."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__([p for name, p in model.named_parameters() if name.endswith("weight")], {"lr": 0.1})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for parameter in self.param_groups[0]["params"]:
            squares = parameter.grad.square().sum(-1)
            rows = self.state[parameter].setdefault("rows", torch.zeros_like(squares))
            rows.add_(squares)
            parameter.sub_(0.1 * parameter.grad / (rows.sqrt() + 0.1).unsqueeze(-1))
            parameter.grad = None


def rows(wrap: Callable[[Any], Any] = lambda net: net) -> tuple[Any, RowScaled]:
    """A small model with that optimizer."""
    torch.manual_seed(0)
    model = wrap(nn.Sequential(nn.Linear(6, 9), nn.Linear(9, 5)))
    optimizer = RowScaled(model)
    return model, optimizer


def row_steps(model: Any, optimizer: RowScaled, count: int) -> list[float]:
    losses = []
    for _ in range(count):
        loss = model(torch.eye(6)).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def clean(name: str) -> str:
    """The name of a parameter on one process."""
    return name.replace("_fsdp_wrapped_module.", "").removeprefix("module.")


# -- ways to divide it; a process group must be there


def fsdp2(net: Net) -> Any:
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for block in net.blocks:
        fully_shard(block, mesh=mesh)
    return fully_shard(net, mesh=mesh)


def fsdp1(net: Net) -> Any:
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.distributed.fsdp.wrap import ModuleWrapPolicy

    return FullyShardedDataParallel(
        net, device_id=torch.device("cpu"), use_orig_params=True, auto_wrap_policy=ModuleWrapPolicy({Block})
    )


def hsdp(net: Net) -> Any:
    from torch.distributed.fsdp import fully_shard

    shape = (2, dist.get_world_size() // 2)
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("replicas", "shards"))
    for block in net.blocks:
        fully_shard(block, mesh=mesh)
    return fully_shard(net, mesh=mesh)


def _parallel(net: Net, mesh: Any) -> None:
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    for block in net.blocks:
        parallelize_module(block, mesh, {"up": ColwiseParallel(), "down": RowwiseParallel()})


def tp(net: Net) -> Any:
    _parallel(net, init_device_mesh("cpu", (dist.get_world_size(),)))
    return net


def fsdp2_tp(net: Net) -> Any:
    from torch.distributed.fsdp import fully_shard

    shape = (dist.get_world_size() // 2, 2)
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("dp", "tp"))
    _parallel(net, mesh["tp"])
    for block in net.blocks:
        fully_shard(block, mesh=mesh["dp"])
    return fully_shard(net, mesh=mesh["dp"])


def ddp(net: Net) -> Any:
    return nn.parallel.DistributedDataParallel(net)


WAYS: dict[str, Callable[[Net], Any]] = {way.__name__: way for way in (fsdp2, fsdp1, hsdp, tp, fsdp2_tp, ddp)}


def whole_state(training: Training) -> dict[str, torch.Tensor]:
    """Gather copies of model and optimizer as torch does, on every rank: names as on one process."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict

    options = StateDictOptions(full_state_dict=True)
    model, optimizer = get_state_dict(training.model, training.optimizer, options=options)
    found = {clean(name): tensor for name, tensor in model.items()}
    for name, entry in optimizer["state"].items():
        found |= {f"{name}: {key}": value for key, value in entry.items() if isinstance(value, torch.Tensor)}
    return {name: tensor.clone() for name, tensor in found.items()}


def differing(training: Training, expected: dict[str, torch.Tensor]) -> list[str]:
    """The tensors of a training, gathered by torch itself, that are not the expected ones in every bit."""
    found = whole_state(training)
    same = {key for key in found.keys() & expected.keys() if torch.equal(found[key], expected[key])}
    return sorted((found.keys() | expected.keys()) - same)
