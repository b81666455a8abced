"""The demo's real text: Python's documentation topics, and a byte-level BPE trained on them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pydoc_data.topics import topics

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

END_OF_TEXT = "<|endoftext|>"


def documents() -> list[str]:
    """About 80 topics, 700 kB of English, in a fixed order."""
    return [topics[name] for name in sorted(topics)]


def jsonl() -> bytes:
    """One object a line, the text in the field `text`."""
    return "".join(json.dumps({"text": text}) + "\n" for text in documents()).encode()


def trained_tokenizer(texts: Sequence[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE of these texts; its first id is END_OF_TEXT."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def tokenizer_files(vocab_size: int) -> dict[str, bytes]:
    """A tokenizer of the topics, as a model folder holds it."""
    tokenizer = trained_tokenizer(documents(), vocab_size)
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": END_OF_TEXT,
        "bos_token": END_OF_TEXT,
        "model_max_length": 2048,
    }
    return {
        "tokenizer.json": tokenizer.to_str().encode(),
        "tokenizer_config.json": json.dumps(config, indent=2).encode(),
    }
