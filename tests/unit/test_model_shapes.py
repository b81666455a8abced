"""Names and shapes of tensors against a config, for what architectures have in common."""

from __future__ import annotations

from typing import Any

import pytest
from kubedistill_trainer.failures import InputsRefused
from kubedistill_trainer.models.shapes import Shape, check_shapes, is_vocabulary, layer_of


def layers(count: int, prefix: str = "model.layers.") -> dict[str, Shape]:
    return {f"{prefix}{n}.mlp.up_proj.weight": (48, 32) for n in range(count)}


EMBEDDING = {"model.embed_tokens.weight": (300, 32)}
HEAD = {"lm_head.weight": (300, 32)}
LLAMA = {"vocab_size": 300, "hidden_size": 32, "num_hidden_layers": 4}
WHOLE = EMBEDDING | HEAD | layers(4)

FITS: dict[str, tuple[dict[str, Shape], dict[str, Any]]] = {
    "llama": (WHOLE, LLAMA),
    "nothing said": (WHOLE, {}),
    "one more to train with": (WHOLE | layers(5), LLAMA | {"num_nextn_predict_layers": 1}),
    "the same, left out": (WHOLE, LLAMA | {"num_nextn_predict_layers": 1}),
    "gpt2": (
        {"wte.weight": (300, 32), "wpe.weight": (64, 32)} | layers(4, "h."),
        {"vocab_size": 300, "n_embd": 32, "n_layer": 4},
    ),
    "a narrow embedding": (
        {"model.decoder.embed_tokens.weight": (300, 16)} | HEAD,
        LLAMA | {"word_embed_proj_dim": 16},
    ),
    "a head that is not loaded": (
        EMBEDDING | {"lm_head.weight": (310, 32)},
        LLAMA | {"tie_word_embeddings": True},
    ),
    "two stacks": (WHOLE | layers(9, "vision_tower.encoder.layers."), LLAMA),
    "a naming of its own": ({"embedding": (310, 16), "stack.0.w": (2, 2)}, LLAMA),
    "layers nowhere": (EMBEDDING, LLAMA),
}
DIFFERS: dict[str, tuple[dict[str, Shape], dict[str, Any], str]] = {
    "rows": (WHOLE, LLAMA | {"vocab_size": 310}, "300 rows in model.embed_tokens.weight"),
    "rows of the head": (
        WHOLE | {"lm_head.weight": (308, 32)}, LLAMA, "308 rows in lm_head.weight",
    ),
    "width": (WHOLE, LLAMA | {"hidden_size": 64}, "32 columns in model.embed_tokens.weight"),
    "fewer layers": (WHOLE, LLAMA | {"num_hidden_layers": 2}, "4 layers (model.layers.0 to 3)"),
    "more layers": (WHOLE, LLAMA | {"num_hidden_layers": 6}, "no tensor of model.layers.4"),
    "a layer between": (
        {n: s for n, s in WHOLE.items() if ".2." not in n}, LLAMA, "no tensor of model.layers.2",
    ),
    "gpt2": (layers(4, "transformer.h."), {"n_layer": 5}, "no tensor of transformer.h.4"),
}  # fmt: skip


@pytest.mark.parametrize("name", FITS)
def test_what_may_be(name: str) -> None:
    shapes, config = FITS[name]
    check_shapes(shapes, config, "spec.teacher", "s3://m")


@pytest.mark.parametrize("name", DIFFERS)
def test_what_makes_another_model(name: str) -> None:
    shapes, config, words = DIFFERS[name]
    with pytest.raises(InputsRefused) as refused:
        check_shapes(shapes, config, "spec.teacher", "s3://m")
    [problem] = refused.value.problems
    assert problem.field == "spec.teacher"
    assert problem.found.startswith(f"{words} of s3://m, whose config.json says ")


def test_names() -> None:
    assert is_vocabulary("transformer.wte.weight") and is_vocabulary("lm_head.weight")
    assert not is_vocabulary("model.embed_tokens_per_layer.weight")
    assert not is_vocabulary("transformer.wpe.weight")
    assert layer_of("model.layers.12.mlp.experts.3.up_proj.weight") == 12
    assert layer_of("lm_head.weight") is None
