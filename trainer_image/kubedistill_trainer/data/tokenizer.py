"""The tokenizer of a model folder, and the digest by which two are told apart."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass

from tokenizers import Tokenizer

from kubedistill_trainer.failures import unreadable
from kubedistill_trainer.store import NoSuchBucket, NotFound, Store

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
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


def load_tokenizer(store: Store, field: str) -> TextTokenizer:
    """Read the tokenizer of a folder. InputsRefused when there is none or it does not parse."""
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
    return TextTokenizer(
        tokenizer, _end_of_text(tokenizer, files, field, store), tokenizer_digest(body), files
    )


def tokenizer_digest(body: bytes) -> str:
    """SHA-256 (hex) of what decides the ids; padding and truncation do not."""
    content = json.loads(body)
    content.pop("padding", None)
    content.pop("truncation", None)
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _end_of_text(tokenizer: Tokenizer, files: dict[str, bytes], field: str, store: Store) -> int:
    settings = json.loads(files.get("tokenizer_config.json", b"{}"))
    named = settings.get("eos_token")
    token = named.get("content") if isinstance(named, dict) else named
    for candidate in (token, "<|endoftext|>", "</s>", "<|end_of_text|>", "<eos>"):
        if candidate is not None and (found := tokenizer.token_to_id(candidate)) is not None:
            return int(found)
    raise unreadable(
        field,
        f"no end-of-text token in {store.uri}",
        "name it as eos_token in tokenizer_config.json",
    )
