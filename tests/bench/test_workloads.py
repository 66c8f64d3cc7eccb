"""Shapes of well-known states: those of transformers' own models, and MLPerf Storage's published sizes."""

from __future__ import annotations

from collections import Counter
from fractions import Fraction
from math import prod
from typing import Any

import pytest
import torch
import transformers

from vembed_async_ckpt.bench.state import StateSpec
from vembed_async_ckpt.bench.workloads import WORKLOADS

QWEN: dict[str, Any] = {
    "text_config": {
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
        "vocab_size": 151936,
    },
    "vision_config": {"hidden_size": 1536},
    "tie_word_embeddings": True,
}
MODELS = {
    "clip": lambda: transformers.CLIPModel(transformers.CLIPConfig()),
    "siglip": lambda: transformers.SiglipModel(transformers.SiglipConfig()),
    "bert": lambda: transformers.BertModel(transformers.BertConfig()),
    "qwen2-vl-2b": lambda: transformers.Qwen2VLForConditionalGeneration(transformers.Qwen2VLConfig(**QWEN)),
}
GIB = 2.0**30


@pytest.mark.parametrize("name", MODELS)
def test_the_shapes_are_those_of_the_model(name: str):
    """Every parameter's, as transformers makes them."""
    with torch.device("meta"):
        model = MODELS[name]()
    model.tie_weights()
    expected = Counter(tuple(parameter.shape) for parameter in model.parameters())
    assert Counter(weight.shape for weight in WORKLOADS[name].weights()) == expected


@pytest.mark.parametrize(
    ("name", "weights", "half", "flat", "largest"),
    [("mlperf-8b", 195, 1.87, 11.2, 3.74), ("mlperf-70b", 483, 2.03, 12.2, 4.07)],
)
def test_mlperf_is_one_rank_of_its_profile(name: str, weights: int, half: float, flat: float, largest: float):
    """fp16 weights, and three fp32 groups: few and huge."""
    found = WORKLOADS[name].weights()
    halves = [weight for weight in found if weight.half]
    flats = [weight for weight in found if not weight.half]
    assert len(halves) == weights
    assert sum(weight.nbytes for weight in halves) / GIB == pytest.approx(half, abs=0.01)
    assert sum(weight.nbytes for weight in flats) / GIB == pytest.approx(flat, abs=0.05)
    assert max(4 * prod(weight.shape) for weight in flats) / GIB == pytest.approx(largest, abs=0.01)


def test_the_default_is_mostly_small_tensors_and_a_few_large_ones():
    """At 1/8: as many tensors as the whole, most of the weights below 64 KiB, the largest a sixth of the bytes."""
    workload = WORKLOADS["clip"]
    whole, scaled = workload.weights(), workload.tensors(Fraction(1, 8))
    assert len(scaled) == len(whole) == 398
    sizes = sorted(4 * prod(weight.shape) for weight in scaled)
    small = sum(size < 64 << 10 for size in sizes) / len(sizes)
    assert 0.5 < small < 0.7
    assert 0.1 < sizes[-1] / sum(sizes) < 0.25
    assert 190 < workload.nbytes(Fraction(1, 8)) / 2**20 < 250


@pytest.mark.parametrize("name", WORKLOADS)
def test_a_state_of_every_workload_is_what_its_numbers_say(name: str):
    """Built at a small scale: bytes and tensors, and every one of them changes between two saves."""
    scale = Fraction(1, 2048)
    workload = WORKLOADS[name]
    state = StateSpec("cpu", name, str(scale)).build()
    weights = workload.tensors(scale)
    assert state.nbytes == workload.nbytes(scale)
    assert len(state.distinct()) == sum(4 if weight.trained else 1 for weight in weights)
    before = {key: tensor.clone() for key, tensor in state.flat().items()}
    state.drift()
    some = [key for key, tensor in before.items() if tensor.numel() >= 8 or tensor.dtype == torch.float32]
    assert [key for key in some if torch.equal(state.flat()[key], before[key])] == []
