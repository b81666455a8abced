"""From shares and counts to sizes; and what is refused, in words that say what to write instead."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from kubedistill_api.pruning import Smaller
from kubedistill_trainer.compress.sizes import Sizes
from kubedistill_trainer.compress.targets import sizes_kept
from kubedistill_trainer.failures import InputsRefused

SMOLLM2 = Sizes(
    layers=30, heads=9, kv_heads=3, head_size=64, ffn=1536, hidden=576, vocabulary=49152
)
LLAMA_70B = Sizes(
    layers=80, heads=64, kv_heads=8, head_size=128, ffn=28672, hidden=8192, vocabulary=128256
)


@pytest.mark.parametrize(
    "sizes,wanted,kept",
    [
        (SMOLLM2, {"layers": 15}, {"layers": 15}),
        (SMOLLM2, {"layers": 0.5}, {"layers": 15}),
        (SMOLLM2, {"layers": 1}, {"layers": 1}),
        (SMOLLM2, {"layers": 30}, {}),
        (SMOLLM2, {"ffn": 0.75}, {"ffn": 1152}),
        (SMOLLM2, {"ffn": 0.7}, {"ffn": 1024}),
        (SMOLLM2, {"ffn": 1001}, {"ffn": 1001}),
        (SMOLLM2, {"embedding": 0.5}, {"hidden": 256}),
        (SMOLLM2, {"heads": 6}, {"heads": 6, "kv_heads": 2}),
        (SMOLLM2, {"heads": 0.67}, {"heads": 6, "kv_heads": 2}),
        (SMOLLM2, {"heads": 0.33}, {"heads": 3, "kv_heads": 1}),
        (SMOLLM2, {"heads": 6, "kv_heads": 3}, {"heads": 6}),
        (SMOLLM2, {"kv_heads": 2}, {"heads": 6, "kv_heads": 2}),
        (SMOLLM2, {"heads": 4, "kv_heads": 2}, {"heads": 4, "kv_heads": 2}),
        (LLAMA_70B, {"heads": 0.5}, {"heads": 32, "kv_heads": 4}),
        (LLAMA_70B, {"heads": 8}, {"heads": 8, "kv_heads": 1}),
        (LLAMA_70B, {"heads": 0.5, "kv_heads": 8}, {"heads": 32}),
        (replace(LLAMA_70B, kv_heads=64), {"heads": 0.75}, {"heads": 48, "kv_heads": 48}),
    ],
)
def test_what_is_kept(sizes: Sizes, wanted: dict[str, Any], kept: dict[str, int]) -> None:
    assert sizes_kept(Smaller(**wanted), sizes, "spec.prune.structured") == replace(sizes, **kept)


@pytest.mark.parametrize(
    "wanted,sentence",
    [
        ({"layers": 31}, "structured.layers: found 31; the model has 30 layers: keep at most"),
        ({"layers": 0.01}, "structured.layers: found 0.01, which leaves none of 30 layers; at"),
        ({"ffn": 0.01}, "structured.ffn: found 0.01, which leaves none of 1536 channels; at least"),
        ({"ffn": 2000}, "structured.ffn: found 2000; the model has 1536 channels"),
        ({"embedding": 600}, "structured.embedding: found 600; the model has 576 channels"),
        (
            {"heads": 0.5},
            "structured.heads: found 0.5, which is 4.5 of 9 heads; each of the 3 key-value heads "
            "serves 3: keep 3 (0.333), 6 (0.667) or 9 (1)",
        ),
        ({"heads": 0.01}, "structured.heads: found 0.01, which is 0.09 of 9 heads; each of"),
        ({"heads": 5}, "structured.heads: found 5; each of the 3 key-value heads serves 3: keep 3"),
        ({"heads": 10}, "structured.heads: found 10; each of the 3 key-value heads serves 3"),
        (
            {"heads": 9, "kv_heads": 2},
            "structured.heads: found 9; each of the 2 key-value heads that are kept serves at most "
            "3: keep 2 (0.222), 4 (0.444) or 6 (0.667)",
        ),
        ({"kv_heads": 4}, "structured.kvHeads: found 4; keep 1 (0.333), 2 (0.667) or 3 (1)"),
        ({"kv_heads": 0.5}, "structured.kvHeads: found 0.5, which is 1.5 of 3 key-value heads"),
    ],
)
def test_what_no_model_can_have_is_refused(wanted: dict[str, Any], sentence: str) -> None:
    with pytest.raises(InputsRefused) as refused:
        sizes_kept(Smaller(**wanted), SMOLLM2, "spec.prune.structured")
    assert f"spec.prune.{sentence}" in refused.value.message
