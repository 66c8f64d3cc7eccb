"""One of 2 or 4 ranks: every rank writes its pieces of a save into one memory; rank 0 compares that with a whole save.

Arguments: a directory, and ways to divide the models. Prints what was compared as JSON.
"""

from __future__ import annotations

import copy
import faulthandler
import json
import mmap
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from transformers import BertConfig, BertModel, CLIPConfig, CLIPModel, LlamaConfig, LlamaForCausalLM

from vembed_async_ckpt._capture.request import Objects, RequestReader
from vembed_async_ckpt._format.plan import TensorContent, plan
from vembed_async_ckpt._format.ranges import Run

RANK, WORLD = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
DIRECTORY = Path(sys.argv[1])
SMALL = {"hidden_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 44}


def bert() -> torch.nn.Module:
    return BertModel(BertConfig(vocab_size=61, max_position_embeddings=33, **SMALL))


def llama() -> torch.nn.Module:
    config = LlamaConfig(vocab_size=53, num_key_value_heads=2, tie_word_embeddings=True, **SMALL)
    return LlamaForCausalLM(config).bfloat16()


def clip() -> torch.nn.Module:
    text = {"vocab_size": 41, "max_position_embeddings": 16, **SMALL}
    return CLIPModel(
        CLIPConfig(text_config=text, vision_config={"image_size": 16, "patch_size": 8, **SMALL}, projection_dim=20)
    )


def adapter() -> torch.nn.Module:
    return get_peft_model(bert(), LoraConfig(target_modules=["query", "value"], r=3))


class Plain(torch.nn.Module):
    """No save_pretrained; tied weights, int64 buffers, one of them not saved."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.norm, self.down = torch.nn.Linear(7, 9), torch.nn.BatchNorm1d(9), torch.nn.Linear(9, 7)
        self.again = torch.nn.Linear(7, 9, bias=False)
        self.again.weight = self.up.weight
        self.register_buffer("seen", torch.arange(5))
        self.register_buffer("scratch", torch.arange(3), persistent=False)


MODELS = {"llama": llama, "bert": bert, "clip": clip, "adapter": adapter, "plain": Plain}
COLUMNS = (
    "q_proj",
    "k_proj",
    "v_proj",
    "gate_proj",
    "up_proj",
    "fc1",
    "intermediate.dense",
    "query",
    "key",
    "value",
    "up",
)
ROWS = ("o_proj", "down_proj", "out_proj", "fc2", "output.dense", "down")


def blocks(model: torch.nn.Module) -> list[torch.nn.Module]:
    return [
        part for part in model.modules() if type(part).__name__.endswith(("DecoderLayer", "EncoderLayer", "BertLayer"))
    ]


def divided(model: torch.nn.Module, how: str) -> torch.nn.Module:
    scalars = {parameter for parameter in model.parameters() if not parameter.dim()}
    if how in ("fsdp1", "hybrid1"):
        return FullyShardedDataParallel(
            model,
            auto_wrap_policy=ModuleWrapPolicy({type(block) for block in blocks(model)}),
            sharding_strategy=ShardingStrategy.HYBRID_SHARD if how == "hybrid1" else ShardingStrategy.FULL_SHARD,
            device_mesh=init_device_mesh("cpu", (2, 2)) if how == "hybrid1" else None,
            ignored_states=scalars,
            use_orig_params=True,
            device_id=torch.device("cpu"),
        )
    mesh = init_device_mesh("cpu", (WORLD,))
    if how in ("tp", "hsdp"):
        mesh = init_device_mesh("cpu", (2, WORLD // 2), mesh_dim_names=("outer", "inner"))
    if how == "tp":
        for block in (*blocks(model), model):
            linear = [name for name, part in block.named_modules() if type(part) is torch.nn.Linear]
            own = {name: name for name in linear if not isinstance(dict(block.named_modules())[name].weight, DTensor)}
            columns = {name: ColwiseParallel() for name in own if name.endswith(COLUMNS)}
            parallelize_module(
                block, mesh["inner"], columns | {name: RowwiseParallel() for name in own if name.endswith(ROWS)}
            )
        if isinstance(model, Plain):
            model.again.weight = model.up.weight  # dividing one layer has undone it
        mesh = mesh["outer"]
    for block in blocks(model):
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh, ignored_params=scalars)
    return model


def stepped(model: torch.nn.Module) -> torch.optim.Optimizer:
    """AdamW over what is trained. Some parameters have no gradients and so no state. The moments follow from the values."""
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    groups = [
        {"params": [p for _, p in trained[::2]], "lr": torch.tensor(0.1)},
        {"params": [p for _, p in trained[1::2]]},
    ]
    optimizer = torch.optim.AdamW(groups, lr=0.05)
    for name, parameter in trained:
        if "pooler" not in name and parameter.numel():
            parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    for parameter, state in optimizer.state.items():
        state["exp_avg"] = (parameter * 2 + 1).detach()
        state["exp_avg_sq"] = (parameter * 3).detach()
    optimizer.zero_grad()
    return optimizer


def whole_values(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and buffers as torch gathers them, under the names of the whole model."""
    with FullyShardedDataParallel.summon_full_params(model, writeback=False):
        return {
            name.replace("_fsdp_wrapped_module.", ""): (v.full_tensor() if isinstance(v, DTensor) else v)
            .detach()
            .clone()
            for name, v in (*model.named_parameters(), *model.named_buffers())
        }


def gather(message: bytes) -> list[bytes]:
    everyone: list[Any] = [None] * WORLD
    dist.all_gather_object(everyone, message)
    return everyone


def write(request: Any, memory: mmap.mmap) -> int:
    """Write this rank's pieces to their places. Returns the number of bytes."""
    laid_out = plan(request.contents)
    shapes = [
        tensor.shape for content in request.contents if isinstance(content, TensorContent) for tensor in content.tensors
    ]
    everything = torch.frombuffer(memory, dtype=torch.uint8)
    count = 0
    for tensor, (index, region) in zip(request.tensors, request.regions, strict=True):
        size = torch.Size(shapes[index]).numel() * tensor.itemsize
        start = laid_out.offsets[index]
        whole = everything[start : start + size].view(tensor.dtype).view(shapes[index])
        if isinstance(region, Run):
            target = whole.view(-1)[region.start : region.start + region.count]
        else:
            target = whole[tuple(slice(a, a + n) for a, n in zip(region.start, region.size, strict=True))]
        assert target.shape == tensor.shape
        target.copy_(tensor)
        count += tensor.nbytes
    if RANK == 0:
        for position, data in laid_out.pieces:
            memory[position : position + len(data)] = data
    return count


def files_of(request: Any, memory: mmap.mmap) -> Iterator[tuple[str, bytes]]:
    for content, file in zip(request.contents, plan(request.contents).files, strict=True):
        yield content.name, memory[file.start : file.start + file.size]


def compare(name: str, model: torch.nn.Module, reference: torch.nn.Module, reader: RequestReader) -> dict[str, Any]:
    optimizer = stepped(model)
    request = reader.read("checkpoint-1", 1, Objects(model=model, optimizer=optimizer))
    again = reader.read("checkpoint-2", 2, Objects(model=model, optimizer=optimizer))
    assert again.contents == request.contents
    assert again.digest == request.digest
    assert all(a.data_ptr() == b.data_ptr() for a, b in zip(again.tensors, request.tensors, strict=True))
    assert len(set(gather(request.digest))) == 1
    claims = gather(request.claims())
    assert request.check_claims(claims) is None, request.check_claims(claims)
    busy = max(range(WORLD), key=lambda rank: len(claims[rank]))
    assert request.check_claims([*claims[:busy], b"[]", *claims[busy + 1 :]]) is not None
    path = DIRECTORY / f"{name}.memory"
    if RANK == 0:
        with open(path, "wb") as file:
            file.truncate(plan(request.contents).end)
    dist.barrier()
    with open(path, "r+b") as file:
        memory = mmap.mmap(file.fileno(), 0)
    copied = sum(int(count) for count in gather(str(write(request, memory)).encode()))
    values = whole_values(model)
    dist.barrier()
    sizes = [sum(t.nbytes for t in c.tensors) for c in request.contents if isinstance(c, TensorContent)]
    assert copied == sum(sizes), "every byte is copied once"
    if RANK == 0:
        check_files(name, dict(files_of(request, memory)), reference, values, request)
    return {"files": [content.name for content in request.contents], "tensors": len(request.outline())}


def check_files(
    name: str, found: dict[str, bytes], reference: Any, values: dict[str, torch.Tensor], request: Any
) -> None:
    with torch.no_grad():
        for key, value in (*reference.named_parameters(), *reference.named_buffers()):
            value.copy_(values[key])
    expected = DIRECTORY / name
    if hasattr(reference, "save_pretrained"):
        reference.save_pretrained(expected)
    else:
        expected.mkdir()
        state = {key: value for key, value in reference.state_dict().items() if key != "again.weight"}
        save_file(state, expected / "model.safetensors", metadata={"format": "pt"})
    moments: dict[str, torch.Tensor] = {"group.0.lr": torch.tensor(0.1)}
    for key, parameter in reference.named_parameters():
        if parameter.requires_grad and "pooler" not in key:
            value = values[key]
            moments |= {
                f"{key}.step": torch.tensor(1.0),
                f"{key}.exp_avg": value * 2 + 1,
                f"{key}.exp_avg_sq": value * 3,
            }
    save_file(moments, expected / "optimizer.safetensors", metadata={"format": "pt"})
    (entry,) = (json.loads(state.described()) for state in request.stepped())
    assert [p[0] for group in entry["parameters"] for p in group] == [
        n for g in entry["rest"]["param_groups"] for n in g["params"]
    ]
    stated, expected_state = set(entry["rest"]["state"]), {key.rpartition(".")[0] for key in moments} - {"group.0"}
    assert stated == expected_state, stated ^ expected_state
    left = {path.name for path in expected.iterdir()} - {"README.md"}
    for file in sorted(left):
        assert found[file] == (expected / file).read_bytes(), (name, file)
    assert found.keys() - {"README.md"} == left


def main() -> None:
    faulthandler.dump_traceback_later(200.0, exit=True)  # a rank that waits for ever says where
    dist.init_process_group("gloo", init_method=os.environ["RENDEZVOUS"], rank=RANK, world_size=WORLD)
    report: dict[str, Any] = {}
    for how in sys.argv[2:]:
        for name, make in MODELS.items():
            torch.manual_seed(0)
            model = make()
            reference = copy.deepcopy(model)
            reader = RequestReader("50GB", True, WORLD, rank=RANK, gather=gather)
            report[f"{name}-{how}"] = compare(f"{name}-{how}", divided(model, how), reference, reader)
    print(json.dumps(report))
    dist.destroy_process_group()


main()
