"""What is kept from save to save: after each change of something it is rendered from, the next checkpoint holds what a fresh
`save_pretrained` writes, byte for byte."""

from __future__ import annotations

import gc
import json
import os
import types
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
import transformers as hf
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from vembed_async_ckpt import AsyncCheckpointer
from vembed_async_ckpt._capture.processor import ProcessorFiles

from .architectures import build
from .checks import BOUND, files, stock

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),  # of peft and transformers about each other
    pytest.mark.filterwarnings("ignore:.*PEFT.*:UserWarning"),
]

WORDS = ["<unk>", "<eos>", "<pad>", "<bos>", *"abcdefghij"]


def tokenizer() -> Any:
    backend = Tokenizer(models.WordLevel({word: n for n, word in enumerate(WORDS)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return hf.PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token="<unk>",
        eos_token="<eos>",
        note={"deep": [1]},
        padding_side="right",
        truncation_side="right",
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
    )


def byte_pairs() -> Any:
    vocabulary = {"<unk>": 0, "a": 1, "b": 2, "ab": 3, "ba": 4}
    backend = Tokenizer(models.BPE(vocabulary, [("a", "b"), ("b", "a")], unk_token="<unk>"))
    return hf.PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")


def slow() -> Any:
    class Letters(hf.PreTrainedTokenizer):
        vocab_files_names = {"vocab_file": "letters.json"}  # noqa: RUF012 - as transformers wants it

        def __init__(self, **options: Any) -> None:
            self.letters = {word: n for n, word in enumerate(WORDS)}
            super().__init__(unk_token="<unk>", **options)

        @property
        def vocab_size(self) -> int:
            return len(self.letters)

        def get_vocab(self) -> dict[str, int]:
            return dict(self.letters)

        def _tokenize(self, text: str) -> list[str]:
            return text.split()

        def _convert_token_to_id(self, token: str) -> int:
            return self.letters.get(token, 0)

        def save_vocabulary(self, save_directory: str, filename_prefix: str | None = None) -> tuple[str]:
            path = os.path.join(save_directory, "letters.json")
            Path(path).write_text(json.dumps(self.letters))
            return (path,)

    return Letters()


def clip() -> Any:
    return hf.CLIPProcessor(hf.CLIPImageProcessorPil(), tokenizer())


def whisper() -> Any:
    return hf.WhisperProcessor(hf.WhisperFeatureExtractor(feature_size=8), tokenizer())


class Odd:
    """A processor of somebody's own: parts under names of their own, a plain object, an array."""

    def __init__(self) -> None:
        self.speller = tokenizer()
        self.eyes = hf.CLIPImageProcessorPil()
        self.crop = types.SimpleNamespace(size=[3, 4])
        self.mean = np.zeros(3)
        self.augmentation = Augmentation()

    def save_pretrained(self, directory: str) -> None:
        self.speller.save_pretrained(os.path.join(directory, "speller"))
        self.eyes.save_pretrained(os.path.join(directory, "eyes"))
        rest = [self.crop.size, self.mean.tolist(), self.augmentation.angles]
        Path(directory, "odd.json").write_text(json.dumps(rest))


class Augmentation:
    def __init__(self) -> None:
        self.angles = [1.0]


def post_processor(t: Any) -> None:
    t.backend_tokenizer.post_processor = processors.TemplateProcessing(single="$A <eos>", special_tokens=[("<eos>", 1)])


def in_component(t: Any) -> None:
    t.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    t.backend_tokenizer.pre_tokenizer.add_prefix_space = True


def other_words(t: Any) -> None:
    words = [*WORDS[:-1], "z"]
    t.backend_tokenizer.model = models.WordLevel({word: n for n, word in enumerate(words)}, unk_token="<unk>")


def train_again(t: Any) -> None:
    from tokenizers.trainers import WordLevelTrainer

    t.backend_tokenizer.train_from_iterator(["x y z"] * 3, WordLevelTrainer(special_tokens=WORDS[:4]))


def chat_templates(t: Any) -> None:
    t.chat_template = {"default": "D", "tool": "T"}


EDITS: dict[str, tuple[Callable[[], Any], Callable[[Any], Any]]] = {
    "pad token": (tokenizer, lambda t: setattr(t, "pad_token", t.eos_token)),
    "bos token": (tokenizer, lambda t: setattr(t, "bos_token", "<bos>")),
    "token that strips": (tokenizer, lambda t: setattr(t, "pad_token", AddedToken("<pad>", lstrip=True))),
    "special tokens": (tokenizer, lambda t: t.add_special_tokens({"additional_special_tokens": ["<bos>"]})),
    "added token": (tokenizer, lambda t: t.add_tokens(["new"])),
    "added token that strips": (tokenizer, lambda t: t.add_tokens([AddedToken("<bos>", rstrip=True)])),
    "input names": (tokenizer, lambda t: setattr(t, "model_input_names", ["input_ids"])),
    "input names, in place": (tokenizer, lambda t: t.model_input_names.append("more")),
    "longest": (tokenizer, lambda t: setattr(t, "model_max_length", 77)),
    "sides": (tokenizer, lambda t: (setattr(t, "padding_side", "left"), setattr(t, "truncation_side", "left"))),
    "cleaning up": (tokenizer, lambda t: setattr(t, "clean_up_tokenization_spaces", True)),
    "init kwargs": (tokenizer, lambda t: t.init_kwargs.update(later="v2")),
    "init kwargs, deep": (tokenizer, lambda t: t.init_kwargs["note"]["deep"].append(2)),
    "one for true": (tokenizer, lambda t: t.init_kwargs["note"]["deep"].__setitem__(0, True)),
    "chat template": (tokenizer, lambda t: setattr(t, "chat_template", "{{ messages }}")),
    "chat templates": (tokenizer, chat_templates),
    "processor class": (tokenizer, lambda t: t._set_processor_class("CLIPProcessor")),
    "normalizer": (tokenizer, lambda t: setattr(t.backend_tokenizer, "normalizer", normalizers.Lowercase())),
    "pre-tokenizer": (tokenizer, lambda t: setattr(t.backend_tokenizer, "pre_tokenizer", pre_tokenizers.Punctuation())),
    "inside a component": (tokenizer, in_component),
    "post-processor": (tokenizer, post_processor),
    "decoder": (tokenizer, lambda t: setattr(t.backend_tokenizer, "decoder", decoders.WordPiece())),
    "padding": (tokenizer, lambda t: t.backend_tokenizer.enable_padding(length=7)),
    "truncation": (tokenizer, lambda t: t.backend_tokenizer.enable_truncation(5)),
    "vocabulary of equal size": (tokenizer, other_words),
    "trained again": (tokenizer, train_again),
    "unknown token of the model": (byte_pairs, lambda t: setattr(t.backend_tokenizer.model, "unk_token", "a")),
    "dropout": (byte_pairs, lambda t: setattr(t.backend_tokenizer.model, "dropout", 0.5)),
    "fused unknowns": (byte_pairs, lambda t: setattr(t.backend_tokenizer.model, "fuse_unk", True)),
    "slow: vocabulary": (slow, lambda t: t.letters.update(z=99)),
    "slow: pad token": (slow, lambda t: setattr(t, "pad_token", "<pad>")),
    "slow: added token": (slow, lambda t: t.add_tokens(["new"])),
    "image: size": (hf.CLIPImageProcessorPil, lambda p: setattr(p, "crop_size", {"height": 3, "width": 4})),
    "image: mean": (hf.CLIPImageProcessorPil, lambda p: setattr(p, "image_mean", [0.25, 0.5, 0.5])),
    "image: flag": (hf.CLIPImageProcessorPil, lambda p: setattr(p, "do_normalize", False)),
    "image: new attribute": (hf.CLIPImageProcessorPil, lambda p: setattr(p, "note", [1])),
    "audio: rate": (hf.WhisperFeatureExtractor, lambda p: setattr(p, "sampling_rate", 8000)),
    "audio: padding": (hf.Wav2Vec2FeatureExtractor, lambda p: setattr(p, "padding_value", 1.0)),
    "clip: pad token": (clip, lambda p: setattr(p.tokenizer, "pad_token", "<pad>")),
    "clip: image flag": (clip, lambda p: setattr(p.image_processor, "do_resize", False)),
    "clip: chat template": (clip, lambda p: setattr(p, "chat_template", "{{ messages }}")),
    "clip: other tokenizer": (clip, lambda p: setattr(p, "tokenizer", byte_pairs())),
    "clip: other image processor": (clip, lambda p: setattr(p, "image_processor", hf.CLIPImageProcessorPil(do_rescale=False))),
    "whisper: rate": (whisper, lambda p: setattr(p.feature_extractor, "sampling_rate", 8000)),
    "own: nested token": (Odd, lambda p: setattr(p.speller, "pad_token", "<pad>")),
    "own: nested normalizer": (Odd, lambda p: setattr(p.speller.backend_tokenizer, "normalizer", normalizers.NFC())),
    "own: nested image flag": (Odd, lambda p: setattr(p.eyes, "do_resize", False)),
    "own: namespace": (Odd, lambda p: p.crop.size.append(5)),
    "own: array, in place": (Odd, lambda p: p.mean.__setitem__(1, 0.5)),
    "own: plain object": (Odd, lambda p: p.augmentation.angles.append(2.0)),
}  # fmt: skip


@pytest.mark.parametrize("name", EDITS)
def test_a_processor_is_saved_as_it_is_now(root: Path, tmp_path: Path, name: str):
    """Changed between two saves; the third, after no change, gives the same files again."""
    make, edit = EDITS[name]
    processor, model = make(), torch.nn.Linear(2, 2)
    with AsyncCheckpointer(root, writer="thread") as checkpointer:

        def saved(step: int) -> dict[str, bytes]:
            found = files(checkpointer.save(step, model=model, processor=processor).result(BOUND).path)
            return {name: data for name, data in found.items() if name != "model.safetensors"}

        first = saved(1)
        edit(processor)
        expected = stock(processor, tmp_path / "stock")
        assert expected != first, "the edit shows"
        assert saved(2) == expected
        assert saved(3) == expected


@pytest.mark.parametrize("make", [tokenizer, byte_pairs, slow, clip, whisper, Odd], ids=lambda make: make.__name__)
def test_an_unchanged_processor_is_rendered_once(monkeypatch: pytest.MonkeyPatch, make: Callable[[], Any]):
    """The same objects come back, also after it was used."""
    processor, kept = make(), ProcessorFiles()
    first = kept.contents(processor, older_readers=True)
    for part in (processor, getattr(processor, "tokenizer", None), getattr(processor, "speller", None)):
        if isinstance(part, hf.PreTrainedTokenizerBase):
            part("a b c")
    monkeypatch.setattr(type(processor), "save_pretrained", lambda *_: pytest.fail("rendered again"))
    assert kept.contents(processor, older_readers=True) is first


# -- side files of models


class Encoder(torch.nn.Module):
    """As sentence-transformers has it: a module with a tokenizer and attributes, without save_pretrained of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.auto_model = build("Bert")
        self.tokenizer = tokenizer()
        self.max_seq_length = 16
        self._options = {"lower": [False]}

    def save(self, directory: str) -> None:
        self.auto_model.save_pretrained(directory)
        self.tokenizer.save_pretrained(directory)
        settings = {"max_seq_length": self.max_seq_length, **self._options}
        Path(directory, "sentence_bert_config.json").write_text(json.dumps(settings))


class Sentences(torch.nn.Sequential):
    """Writes its parts, a list of them, and its prompts."""

    def __init__(self) -> None:
        super().__init__(Encoder(), torch.nn.Dropout(0.5), torch.nn.Linear(16, 4))
        self.prompts = {"query": "q: "}
        self._similarity: str | None = None

    def save_pretrained(self, save_directory: str) -> None:
        self[0].save(save_directory)
        os.makedirs(os.path.join(save_directory, "2_Dense"), exist_ok=True)
        torch.save(self[2].state_dict(), os.path.join(save_directory, "2_Dense", "dense.bin"))
        kinds = [type(part).__name__ for part in self]
        described = {"parts": kinds, "prompts": self.prompts, "similarity": self._similarity, "p": self[1].p}
        Path(save_directory, "modules.json").write_text(json.dumps(described))


def lora() -> Any:
    return peft.get_peft_model(build("Bert"), peft.LoraConfig(r=2, target_modules=["query", "value"]))


def more(m: Any) -> Any:
    m.add_adapter("more", peft.LoraConfig(r=3, target_modules=["key"]))
    return m


def with_adapters() -> Any:
    """transformers' own way to have adapters: only the active one is saved."""
    model = build("Bert")
    for name in ("default", "other"):
        model.add_adapter(peft.LoraConfig(r=2, target_modules=["query"], init_lora_weights=False), name)
    model.set_adapter("default")
    return model


def ignoring(m: Any) -> None:
    m._keys_to_ignore_on_save = ["lm_head.weight"]


def drop(state: dict[str, Any], name: str) -> None:
    del state[name]


def hooked(m: Any) -> None:
    m.register_state_dict_post_hook(lambda module, state, prefix, _: drop(state, "lm_head.weight"))


def hooked_inside(m: Any) -> None:
    mlp = m.model.layers[0].mlp
    mlp.register_state_dict_post_hook(lambda module, state, prefix, _: drop(state, prefix + "up_proj.weight"))


def other_state_dict(m: Any) -> None:
    def state_dict(self: Any, *args: Any, **kwargs: Any) -> Any:
        state = type(self).state_dict(self, *args, **kwargs)
        del state["lm_head.weight"]
        return state

    m.state_dict = types.MethodType(state_dict, m)


def other_save_pretrained(m: Any) -> None:
    def save_pretrained(self: Any, save_directory: str, **options: Any) -> None:
        type(self).save_pretrained(self, save_directory, **options)
        Path(save_directory, "note.txt").write_text("patched")

    m.save_pretrained = types.MethodType(save_pretrained, m)


def untied(m: Any) -> None:
    m.lm_head.weight = torch.nn.Parameter(m.lm_head.weight.detach().clone() + 1)
    m.config.tie_word_embeddings = False


def parametrized(m: Any) -> None:
    torch.nn.utils.parametrizations.weight_norm(m.lm_head)


def kept_buffer(m: Any) -> None:
    m.model.rotary_emb._non_persistent_buffers_set.discard("inv_freq")


def llama() -> Any:
    return build("Llama")


MODEL_EDITS: dict[str, tuple[Callable[[], Any], Callable[[Any], Any]]] = {
    "ignored keys": (llama, ignoring),
    "state_dict hook": (llama, hooked),
    "state_dict hook inside": (llama, hooked_inside),
    "state_dict replaced": (llama, other_state_dict),
    "save_pretrained replaced": (llama, other_save_pretrained),
    "parametrization": (llama, parametrized),
    "persistence of a buffer": (llama, kept_buffer),
    "tie": (lambda: build("GPT2, tied"), untied),
    "dtype": (llama, lambda m: m.to(torch.bfloat16)),
    "dtype of a part": (llama, lambda m: m.lm_head.to(torch.float16)),
    "config": (llama, lambda m: setattr(m.config, "note", {"a": [1]})),
    "config, rope": (llama, lambda m: m.config.rope_parameters.update(rope_theta=5.0)),
    "config replaced": (llama, lambda m: setattr(m, "config", type(m.config)(**{**m.config.to_dict(), "note": 2}))),
    "nested config": (lambda: build("CLIP"), lambda m: setattr(m.config.vision_config, "note", 1)),
    "generation config": (llama, lambda m: setattr(m.generation_config, "max_new_tokens", 7)),
    "generation config replaced": (llama, lambda m: setattr(m, "generation_config", hf.GenerationConfig(top_k=3, do_sample=True))),
    "peft: config": (lora, lambda m: setattr(m.peft_config["default"], "lora_alpha", 3)),
    "peft: config, in place": (lora, lambda m: m.peft_config["default"].target_modules.add("key")),
    "peft: adapter added": (lora, more),
    "peft: adapter deleted": (lambda: more(lora()), lambda m: m.delete_adapter("more")),
    "adapters: another active": (with_adapters, lambda m: m.set_adapter("other")),
    "sentences: length": (Sentences, lambda m: setattr(m[0], "max_seq_length", 8)),
    "sentences: options": (Sentences, lambda m: m[0]._options["lower"].append(True)),
    "sentences: tokenizer": (Sentences, lambda m: setattr(m[0].tokenizer, "pad_token", "<pad>")),
    "sentences: prompts": (Sentences, lambda m: m.prompts.update(passage="p: ")),
    "sentences: private": (Sentences, lambda m: setattr(m, "_similarity", "dot")),
    "sentences: setting of a layer": (Sentences, lambda m: setattr(m[1], "p", 0.25)),
    "sentences: config": (Sentences, lambda m: setattr(m[0].auto_model.config, "note", 1)),
}  # fmt: skip


def written(directory: Path) -> dict[str, bytes]:
    """What `save_pretrained` writes of a checkpoint, without what ours saves besides."""
    return {name: data for name, data in files(directory).items() if not name.startswith("vembed_")}


@pytest.mark.parametrize("name", MODEL_EDITS)
def test_a_model_is_saved_as_it_is_now(root: Path, tmp_path: Path, name: str):
    """Changed between two saves; the third, after no change, gives the same files again."""
    make, edit = MODEL_EDITS[name]
    model = make()
    with AsyncCheckpointer(root, writer="thread") as checkpointer:
        first = written(checkpointer.save(1, model=model).result(BOUND).path)
        edit(model)
        expected = stock(model, tmp_path / "stock")
        assert expected != first, "the edit shows"
        assert written(checkpointer.save(2, model=model).result(BOUND).path) == expected
        assert written(checkpointer.save(3, model=model).result(BOUND).path) == expected


def not_ignoring(m: Any) -> None:
    m._keys_to_ignore_on_save = None


def not_hooked(m: Any) -> None:
    m._state_dict_hooks.clear()


def own_state_dict(m: Any) -> None:
    del m.state_dict


@pytest.mark.parametrize(
    ("leave_out", "undo"),
    [(ignoring, not_ignoring), (hooked, not_hooked), (other_state_dict, own_state_dict)],
    ids=["ignored", "hook", "state_dict"],
)
def test_what_a_model_leaves_out_comes_back(root: Path, tmp_path: Path, leave_out: Any, undo: Any):
    """Left out for the first save only: the second holds all weights."""
    model = llama()
    with AsyncCheckpointer(root, writer="thread") as checkpointer:
        leave_out(model)
        first = written(checkpointer.save(1, model=model).result(BOUND).path)
        undo(model)
        expected = stock(model, tmp_path / "stock")
        assert len(first["model.safetensors"]) < len(expected["model.safetensors"])
        assert written(checkpointer.save(2, model=model).result(BOUND).path) == expected


@pytest.mark.parametrize("make", [llama, Sentences, lora], ids=lambda make: make.__name__)
def test_a_model_that_is_gone_is_not_held(root: Path, make: Callable[[], Any]):
    """Whatever was remembered of it."""
    model = make()
    gone = weakref.ref(model)
    with AsyncCheckpointer(root, writer="thread") as checkpointer:
        for step in (1, 2):
            checkpointer.save(step, model=model).result(BOUND)
        del model
        gc.collect()
        assert gone() is None


def test_a_hook_that_decides_each_time(root: Path, tmp_path: Path):
    """Nothing says that it will decide otherwise at the next save."""
    model, wanted = llama(), {"all": False}

    def decide(module: Any, state: Any, prefix: str, _: Any) -> None:
        if not wanted["all"]:
            del state["lm_head.weight"]

    model.register_state_dict_post_hook(decide)
    with AsyncCheckpointer(root, writer="thread") as checkpointer:
        checkpointer.save(1, model=model).result(BOUND)
        wanted["all"] = True
        expected = stock(model, tmp_path / "stock")
        assert written(checkpointer.save(2, model=model).result(BOUND).path) == expected
