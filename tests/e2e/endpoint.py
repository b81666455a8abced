"""A server for teachers behind endpoints. Apart from the kit: only its tests wait for torch."""

from __future__ import annotations

from dataclasses import replace

from data_kit import Bucket
from endpoint_kit import Mind
from kubedistill_trainer.data.tokenizer import load_tokenizer

import e2e.gang  # noqa: F401  (it knows where the demo's text is)


def small_mind() -> Mind:
    """A tiny model with the tokenizer that `put_inputs` puts into the store."""
    import corpus

    files = Bucket()
    files.put("tokenizer", corpus.tokenizer_files(512))
    tokenizer = load_tokenizer(files.open("s3://data/tokenizer"), "tokenizer")
    # Room for the longest task in tokens of a small vocabulary.
    return replace(Mind.tiny(tokenizer=tokenizer), context=2048)
