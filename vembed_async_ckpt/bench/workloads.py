"""Shapes of well-known states, as constants: no hub, no torch.

CLIP, SigLIP and BERT have the sizes of transformers' default configs, Qwen2-VL those of the 2B model: fp32 weights with
AdamW's two moments and a count of steps each. The MLPerf profiles are what the first rank of MLPerf Storage's Llama 3
checkpoints writes: fp16 weights, and fp32 master weights and moments as flat tensors.

    workload = WORKLOADS["clip"]
    workload.tensors(Fraction(1, 8))        every weight of the state, with its shape at that scale
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from math import ceil, prod

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Weight:
    """`trained`: AdamW keeps two moments and a count of steps for it. A weight that is not trained still changes before
    each save."""

    name: str
    shape: Shape
    half: bool = False
    trained: bool = True

    @property
    def nbytes(self) -> int:
        """Of the weight and of what AdamW keeps for it."""
        size = prod(self.shape) * (2 if self.half else 4)
        return size * 3 + 4 if self.trained else size


@dataclass(frozen=True)
class Workload:
    """`scale`: at which it is measured unless told otherwise."""

    name: str
    title: str
    scale: Fraction
    weights: Callable[[], list[Weight]]

    def tensors(self, scale: Fraction) -> list[Weight]:
        """Every weight at that scale.

        Of matrices the first dimension is divided and vectors stay whole, so that their number and the share of small ones
        stay. Of flat states (MLPerf) every length is divided.
        """
        return [
            Weight(weight.name, self._scaled(weight.shape, scale), weight.half, weight.trained)
            for weight in self.weights()
        ]

    def _scaled(self, shape: Shape, scale: Fraction) -> Shape:
        if not shape or (len(shape) == 1 and not self.name.startswith("mlperf")):
            return shape
        return (max(1, ceil(shape[0] * scale)), *shape[1:])

    def nbytes(self, scale: Fraction) -> int:
        return sum(weight.nbytes for weight in self.tensors(scale))


# -- transformers' models

Named = list[tuple[str, Shape]]


def _linear(name: str, outputs: int, inputs: int) -> Named:
    return [(f"{name}.weight", (outputs, inputs)), (f"{name}.bias", (outputs,))]


def _norm(name: str, width: int) -> Named:
    return [(f"{name}.weight", (width,)), (f"{name}.bias", (width,))]


def _layers(name: str, count: int, width: int, inner: int) -> Named:
    """Transformer encoder layers: four projections, two of the feed-forward, two norms."""
    found: Named = []
    for number in range(count):
        at = f"{name}.{number}"
        for projection in ("query", "key", "value", "out"):
            found += _linear(f"{at}.{projection}", width, width)
        found += _norm(f"{at}.norm1", width) + _linear(f"{at}.fc1", inner, width)
        found += _linear(f"{at}.fc2", width, inner) + _norm(f"{at}.norm2", width)
    return found


def _clip() -> Named:
    return [
        ("logit_scale", ()),
        ("text.tokens", (49408, 512)),
        ("text.positions", (77, 512)),
        *_layers("text.layers", 12, 512, 2048),
        *_norm("text.norm", 512),
        ("vision.class", (768,)),
        ("vision.patches", (768, 3, 32, 32)),
        ("vision.positions", (50, 768)),
        *_norm("vision.norm1", 768),
        *_layers("vision.layers", 12, 768, 3072),
        *_norm("vision.norm2", 768),
        ("vision.projection", (512, 768)),
        ("text.projection", (512, 512)),
    ]


def _siglip() -> Named:
    return [
        ("logit_scale", (1,)),
        ("logit_bias", (1,)),
        ("text.tokens", (32000, 768)),
        ("text.positions", (64, 768)),
        *_layers("text.layers", 12, 768, 3072),
        *_norm("text.norm", 768),
        *_linear("text.head", 768, 768),
        ("vision.patches", (768, 3, 16, 16)),
        ("vision.patches.bias", (768,)),
        ("vision.positions", (196, 768)),
        *_layers("vision.layers", 12, 768, 3072),
        *_norm("vision.norm", 768),
        ("vision.head.probe", (1, 1, 768)),
        *_linear("vision.head.in", 3 * 768, 768),
        *_linear("vision.head.out", 768, 768),
        *_norm("vision.head.norm", 768),
        *_linear("vision.head.fc1", 3072, 768),
        *_linear("vision.head.fc2", 768, 3072),
    ]


def _bert() -> Named:
    return [
        ("words", (30522, 768)),
        ("positions", (512, 768)),
        ("types", (2, 768)),
        *_norm("norm", 768),
        *_layers("layers", 12, 768, 3072),
        *_linear("pooler", 768, 768),
    ]


def _qwen2_vl_2b() -> Named:
    width, inner, keys = 1536, 8960, 256
    found: Named = [("tokens", (151936, width))]
    for number in range(28):
        at = f"layers.{number}"
        found += _linear(f"{at}.query", width, width) + _linear(f"{at}.key", keys, width)
        found += _linear(f"{at}.value", keys, width)
        found += [(f"{at}.out", (width, width)), (f"{at}.gate", (inner, width)), (f"{at}.up", (inner, width))]
        found += [(f"{at}.down", (width, inner)), (f"{at}.norm1", (width,)), (f"{at}.norm2", (width,))]
    found += [("norm", (width,)), ("vision.patches", (1280, 3, 2, 14, 14))]
    for number in range(32):
        at = f"vision.layers.{number}"
        found += _norm(f"{at}.norm1", 1280) + _norm(f"{at}.norm2", 1280) + _linear(f"{at}.qkv", 3 * 1280, 1280)
        found += _linear(f"{at}.out", 1280, 1280) + _linear(f"{at}.fc1", 5120, 1280) + _linear(f"{at}.fc2", 1280, 5120)
    found += _norm("vision.merger.norm", 1280) + _linear("vision.merger.fc1", 5120, 5120)
    return found + _linear("vision.merger.fc2", width, 5120)


def _trained(shapes: Callable[[], Named]) -> Callable[[], list[Weight]]:
    return lambda: [Weight(name, shape) for name, shape in shapes()]


# -- MLPerf Storage


@dataclass(frozen=True)
class _Llama:
    """One profile: its model and over how many ranks it is spread. ZeRO stage 3, no pipeline."""

    layers: int
    hidden: int
    inner: int
    heads: int
    vocabulary: int
    tensor_ranks: int
    data_ranks: int

    def weights(self) -> list[Weight]:
        """Of the first rank. The master weights stand beside the fp16 ones and are what AdamW trains."""
        hidden, keys = self.hidden, self.hidden // self.heads * 8
        ranks, data = self.tensor_ranks, self.data_ranks
        matrices = (hidden * (hidden + 2 * keys), hidden * hidden, 2 * hidden * self.inner, hidden * self.inner)
        layer = [hidden, matrices[0] // ranks, matrices[1] // ranks, hidden, matrices[2] // ranks, matrices[3] // ranks]
        embedding = hidden * self.vocabulary // ranks
        lengths = [length // data for length in [*layer * self.layers, embedding, embedding, hidden]]
        per_layer = 2 * hidden + sum(matrices)
        parameters = 2 * self.vocabulary * hidden + per_layer * self.layers + hidden
        return [
            *(Weight(f"weight{n:03}", (length,), half=True, trained=False) for n, length in enumerate(lengths)),
            Weight("master0", (parameters // (data * ranks),)),
            Weight("master1", (5 * hidden,)),
        ]


_8B = _Llama(32, 4096, 14336, 32, 128256, tensor_ranks=1, data_ranks=8)
_70B = _Llama(80, 8192, 28672, 128, 128256, tensor_ranks=8, data_ranks=8)

DEFAULT = "clip"
WORKLOADS: dict[str, Workload] = {
    workload.name: workload
    for workload in (
        Workload("clip", "CLIP ViT-B/32", Fraction(1, 8), _trained(_clip)),
        Workload("siglip", "SigLIP base", Fraction(1, 8), _trained(_siglip)),
        Workload("bert", "BERT base", Fraction(1, 8), _trained(_bert)),
        Workload("qwen2-vl-2b", "Qwen2-VL 2B", Fraction(1, 64), _trained(_qwen2_vl_2b)),
        Workload("mlperf-8b", "Llama 3 8B, MLPerf Storage, one rank of 8", Fraction(1, 64), _8B.weights),
        Workload("mlperf-70b", "Llama 3 70B, MLPerf Storage, one rank of 64", Fraction(1, 64), _70B.weights),
    )
}
