"""Small data for tests of `data`: a tokenizer, chat templates, files, and a job that reads them."""

from __future__ import annotations

import json
from typing import Any

from kubedistill_api.job import DistillationJobSpec
from kubedistill_api.runspec import ResolvedModel, RunSpec
from kubedistill_trainer.data.tokenizer import TextTokenizer, tokenizer_digest
from kubedistill_trainer.store import NotFound
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

END = "<|endoftext|>"
TURNS = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""ChatML, as many models have it."""
STRICT = (
    "{% for m in messages %}"
    "{% if m.role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% if m.role == 'user' %}{{ '[Q]' + m.content + '[/Q]' }}"
    "{% else %}{{ ' ' + m.content | trim + ' ' + eos_token }}{% endif %}{% endfor %}"
)
"""In the manner of Mistral's: no system, turns by turns, no text that asks for an answer."""


def tokenizer(template: str | None = TURNS, blanks_in_place: bool = True) -> TextTokenizer:
    """A byte-level BPE of its own; `blanks_in_place`: whether a token's place holds its blank."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.post_processor = processors.ByteLevel(trim_offsets=not blanks_in_place)
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        special_tokens=[END, "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(
        ["user\nassistant\nthe answer to the question is the question "] * 4, trainer
    )
    body = bpe.to_str().encode()
    settings = {"eos_token": {"content": END}, "model_max_length": 64}
    files = {"tokenizer.json": body, "tokenizer_config.json": json.dumps(settings).encode()}
    if template is not None:
        files["chat_template.jinja"] = template.encode()
    return TextTokenizer(bpe, 0, tokenizer_digest(body), files)


class Bucket:
    """s3://data/… as a dict; what `data` and the checks of tokenizers ask of a store."""

    def __init__(self, **objects: bytes) -> None:
        self.objects = objects

    def open(self, uri: str) -> Any:
        return _Folder(self.objects, uri, uri.removeprefix("s3://data").strip("/"))

    def put(self, folder: str, files: dict[str, bytes]) -> None:
        self.objects |= {f"{folder}/{name}": body for name, body in files.items()}


class _Folder:
    def __init__(self, objects: dict[str, bytes], uri: str, prefix: str) -> None:
        self._objects, self.uri, self._prefix = objects, uri, f"{prefix}/".lstrip("/")

    def get(self, name: str) -> bytes:
        if self._prefix + name not in self._objects:
            raise NotFound("get", self.uri_of(name), "it is not there")
        return self._objects[self._prefix + name]

    def head(self, name: str) -> int | None:
        found = self._objects.get(self._prefix + name)
        return None if found is None else len(found)

    def uri_of(self, name: str) -> str:
        return f"{self.uri}/{name}"


def jsonl(*records: Any) -> bytes:
    return "".join(json.dumps(record) + "\n" for record in records).encode()


def job(*sources: dict[str, Any], **parts: Any) -> RunSpec:
    """A fineTune job on these sources, with the tokenizer of s3://data/tokenizer; `parts` of the spec
    are put over its own, those of `data` among them."""
    data = {
        "sources": list(sources), "tokenizer": {"uri": "s3://data/tokenizer"},
        "sequenceLength": 32, "holdout": 0.2, **parts.pop("data", {}),
    }  # fmt: skip
    models = {name: parts.pop(name, None) for name in ("teacher_model", "student_model")}
    fields = {
        "fineTune": {}, "student": {"config": {"model_type": "llama"}}, "data": data,
        "storage": {"uri": "s3://data/runs"}, "training": {"globalBatchSize": 4, "epochs": 4}, **parts,
    }  # fmt: skip
    return RunSpec(
        namespace="n", name="j", uid="u", role="student", inputs_digest="d" * 64,
        spec=DistillationJobSpec.model_validate(fields),
        **{name: ResolvedModel(uri=uri, digest="") for name, uri in models.items() if uri},
    )  # fmt: skip
