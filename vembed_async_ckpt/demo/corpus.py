"""What the demo trains on: signatures and docstrings of this machine's Python standard library."""

from __future__ import annotations

import ast
import hashlib
import os
import sysconfig
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

_SKIPPED = frozenset(
    {"site-packages", "dist-packages", "lib-dynload", "__pycache__", "test", "tests", "idlelib"}  # not the library
    | {"encodings", "pydoc_data"}  # tables: a fifth of the source, next to no docstrings
)
_SPECIAL = {
    "pad_token": "[PAD]",
    "unk_token": "[UNK]",
    "cls_token": "[CLS]",
    "sep_token": "[SEP]",
    "mask_token": "[MASK]",
}


@dataclass(frozen=True, slots=True)
class Pair:
    """A qualified signature and the docstring that belongs to it."""

    signature: str
    docstring: str


def standard_library_pairs() -> list[Pair]:
    """Every documented function and class, in an order that only the files decide; no module is imported.

    A docstring appears once, so that in-batch negatives are never the answer. RuntimeError if the sources are missing.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    by_docstring: dict[str, Pair] = {}
    for path in _sources(root):
        for pair in _pairs_of(path, _module_name(path.relative_to(root))):
            by_docstring.setdefault(pair.docstring, pair)
    if not by_docstring:
        raise RuntimeError(f"no Python sources under {root}: the demo trains on the standard library's docstrings")
    return list(by_docstring.values())


def digest(pairs: list[Pair]) -> str:
    """Equal for equal pairs in equal order; it tells two Python installations apart."""
    state = hashlib.sha256()
    for pair in pairs:
        state.update(f"{pair.signature}\0{pair.docstring}\0".encode())
    return state.hexdigest()[:16]


def train_tokenizer(pairs: list[Pair], vocabulary: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE of at most `vocabulary` tokens; the same pairs give the same tokenizer."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=list(_SPECIAL.values()),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator((text for pair in pairs for text in (pair.signature, pair.docstring)), trainer)
    bpe.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        special_tokens=[(token, bpe.token_to_id(token)) for token in ("[CLS]", "[SEP]")],
    )
    return PreTrainedTokenizerFast(tokenizer_object=bpe, **_SPECIAL)


class Batches:
    """Batch number `step` as a pure function of (pairs, seed, step): resuming needs no position but the step."""

    def __init__(self, pairs: list[Pair], tokenizer: Any, *, batch_size: int, length: int, seed: int) -> None:
        self._signatures = _encode(tokenizer, [pair.signature for pair in pairs], length)
        self._docstrings = _encode(tokenizer, [pair.docstring for pair in pairs], length)
        self._padding = int(tokenizer.pad_token_id)
        self._batch_size = batch_size
        self._seed = seed

    def __getitem__(self, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(ids, attention mask) of the batch's signatures followed by its docstrings, cut to the longest of them."""
        count = len(self._signatures)
        epoch, position = divmod(step, count // self._batch_size)
        order = torch.randperm(count, generator=torch.Generator().manual_seed(self._seed + epoch))
        rows = order[position * self._batch_size : (position + 1) * self._batch_size]
        ids = torch.cat((self._signatures[rows], self._docstrings[rows]))
        mask = ids != self._padding
        longest = int(mask.sum(1).max())
        return ids[:, :longest], mask[:, :longest].long()


def _encode(tokenizer: Any, texts: list[str], length: int) -> torch.Tensor:
    encoded = tokenizer(texts, padding="max_length", truncation=True, max_length=length, return_tensors="pt")
    ids: torch.Tensor = encoded["input_ids"]
    return ids


def _sources(root: Path) -> Iterator[Path]:
    for folder, folders, files in os.walk(root):
        folders[:] = sorted(set(folders) - _SKIPPED)
        yield from (Path(folder, name) for name in sorted(files) if name.endswith(".py"))


def _module_name(path: Path) -> str:
    return ".".join(path.with_suffix("").parts).removesuffix(".__init__")


def _pairs_of(path: Path, module: str) -> Iterator[Pair]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # invalid escapes in other people's files are not the user's concern
        try:
            tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError):  # lib2to3 ships files in Python 2
            return
    yield from _documented(tree, module)


def _documented(parent: ast.Module | ast.ClassDef, prefix: str) -> Iterator[Pair]:
    for node in parent.body:
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            continue
        name = f"{prefix}.{node.name}"
        if docstring := ast.get_docstring(node):
            yield Pair(f"{name}({_arguments(node)})", docstring)
        if isinstance(node, ast.ClassDef):
            yield from _documented(node, name)


def _arguments(node: ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) -> str:
    if isinstance(node, ast.ClassDef):
        return ", ".join(ast.unparse(base) for base in node.bases)
    return ast.unparse(node.args)
