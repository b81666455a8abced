"""The tokenizer of a model folder, and the digest by which two are told apart."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from tokenizers import Tokenizer

from kubedistill_trainer.failures import unreadable
from kubedistill_trainer.store import NoSuchBucket, NotFound, Store

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
)
_NAMED_TOKENS = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)


@dataclass(frozen=True)
class TextTokenizer:
    """A tokenizer with its id for the end of a text, and its files as they lie in the folder."""

    tokenizer: Tokenizer
    end_of_text: int
    digest: str
    files: dict[str, bytes]

    @property
    def vocab_size(self) -> int:
        """One more than the greatest id."""
        return max(self.tokenizer.get_vocab(with_added_tokens=True).values()) + 1

    @property
    def chat_template(self) -> str | None:
        """The Jinja template of conversations that lies with the tokenizer, if any."""
        if "chat_template.jinja" in self.files:
            return self.files["chat_template.jinja"].decode()
        found = self._settings().get("chat_template")
        if isinstance(found, list):  # several, each with a name
            found = {entry.get("name"): entry.get("template") for entry in found}.get("default")
        return found if isinstance(found, str) else None

    @property
    def named_tokens(self) -> Mapping[str, str]:
        """What a chat template may ask for by name: `eos_token` and the like."""
        settings = self._settings()
        found = {name: _token(settings.get(name)) for name in _NAMED_TOKENS}
        found["eos_token"] = found["eos_token"] or self.tokenizer.id_to_token(self.end_of_text)
        return {name: token for name, token in found.items() if token is not None}

    def with_chat_template(self, template: str) -> TextTokenizer:
        """The same with another chat template in its files."""
        files = {**self.files, "chat_template.jinja": template.encode()}
        if "tokenizer_config.json" in files:
            settings = self._settings()
            settings.pop("chat_template", None)
            files["tokenizer_config.json"] = json.dumps(settings, indent=2).encode()
        return replace(self, files=files)

    def _settings(self) -> dict[str, Any]:
        settings: dict[str, Any] = json.loads(self.files.get("tokenizer_config.json", b"{}"))
        return settings


def load_tokenizer(store: Store, field: str) -> TextTokenizer:
    """Read the tokenizer of a folder. InputsRefused when there is none or a file does not parse.

    Whole texts are encoded, each by itself: what the file says of truncation and padding, which
    whoever saved it left on, would cut and fill them.
    """
    try:
        body = store.get("tokenizer.json")
    except (NotFound, NoSuchBucket) as error:
        raise unreadable(
            field, f"no tokenizer.json in {store.uri}", "give a folder with a tokenizer.json"
        ) from error
    files = {"tokenizer.json": body}
    for name in TOKENIZER_FILES[1:]:
        if store.head(name) is not None:
            files[name] = store.get(name)
    try:
        tokenizer = Tokenizer.from_buffer(body)
    except Exception as error:  # the library raises bare Exception for whatever does not parse
        raise unreadable(
            field, f"{store.uri_of('tokenizer.json')}: {error}", "give a tokenizers-library file"
        ) from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    _check_files(files, field, store)
    return TextTokenizer(
        tokenizer, _end_of_text(tokenizer, files, field, store), tokenizer_digest(body), files
    )


def _check_files(files: Mapping[str, bytes], field: str, store: Store) -> None:
    """The files beside tokenizer.json hold what is read of them later."""
    try:
        name = "tokenizer_config.json"
        settings = json.loads(files.get(name, b"{}"))
        if not isinstance(settings, dict):
            raise ValueError("no JSON object")
        name = "chat_template.jinja"
        files.get(name, b"").decode()
    except ValueError as error:
        raise unreadable(
            field, f"{store.uri_of(name)}: {error}", "upload the tokenizer's files again"
        ) from error


def tokenizer_digest(body: bytes) -> str:
    """SHA-256 (hex) of what decides the ids; padding and truncation do not."""
    content = json.loads(body)
    content.pop("padding", None)
    content.pop("truncation", None)
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _end_of_text(tokenizer: Tokenizer, files: dict[str, bytes], field: str, store: Store) -> int:
    token = _token(json.loads(files.get("tokenizer_config.json", b"{}")).get("eos_token"))
    for candidate in (token, "<|endoftext|>", "</s>", "<|end_of_text|>", "<eos>"):
        if candidate is not None and (found := tokenizer.token_to_id(candidate)) is not None:
            return int(found)
    raise unreadable(
        field,
        f"no end-of-text token in {store.uri}",
        "name it as eos_token in tokenizer_config.json",
    )


def _token(named: Any) -> str | None:
    """A token of tokenizer_config.json, which is written as text or as an object."""
    found = named.get("content") if isinstance(named, dict) else named
    return found if isinstance(found, str) else None
