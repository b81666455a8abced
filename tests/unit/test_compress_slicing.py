"""Every described architecture, on tiny random models: what is cut without loss loses nothing."""

from __future__ import annotations

import dataclasses
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import torch
from kubedistill_trainer.compress.architecture import Architecture, architecture_of
from kubedistill_trainer.compress.calibration import Batch, working_on
from kubedistill_trainer.compress.choosing import Kept, choose
from kubedistill_trainer.compress.importance import Scores, Statistics, by_activation, collect
from kubedistill_trainer.compress.sizes import Shapes, Sizes, sizes_of, tensors_of
from kubedistill_trainer.compress.slicing import cut
from kubedistill_trainer.failures import InputsRefused
from transformers import AutoConfig, AutoModelForCausalLM

HIDDEN, FFN, LAYERS, HEADS, KV_HEADS, HEAD = 32, 48, 4, 8, 2, 8
DESCRIBED = sorted(
    entry.name.removesuffix(".toml")
    for entry in (files("kubedistill_trainer.compress") / "architectures").iterdir()
    if entry.name.endswith(".toml")
)
every_architecture = pytest.mark.parametrize("model_type", DESCRIBED)


@dataclasses.dataclass
class Subject:
    model: Any
    architecture: Architecture
    sizes: Sizes
    batches: list[Batch]

    @property
    def statistics(self) -> Statistics:
        return collect(self.model, self.architecture, self.sizes, self.batches)

    @property
    def scores(self) -> Scores:
        return by_activation(self.model, self.architecture, self.statistics)

    def logits(self, model: Any) -> torch.Tensor:
        with torch.no_grad():
            return torch.cat([model(tokens).logits for tokens, *_ in self.batches])


def subject(model_type: str, **keys: Any) -> Subject:
    torch.manual_seed(0)
    sizes = {
        "hidden_size": HIDDEN, "intermediate_size": FFN, "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "head_dim": HEAD,
        "vocab_size": 64, "pad_token_id": 0, "rms_norm_eps": 1e-12,
    }  # fmt: skip
    config = AutoConfig.for_model(model_type, **sizes, **keys)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    tokens = torch.randint(1, 64, (4, 16))
    positions = torch.arange(16).expand(4, 16)
    return Subject(
        model,
        architecture_of(model_type, "spec.student"),
        measured(model),
        [(part, positions[:2], part) for part in (tokens[:2], tokens[2:])],
    )


def shapes_of(model: Any) -> Shapes:
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def measured(model: Any) -> Sizes:
    architecture = architecture_of(model.config.model_type, "spec.student")
    return sizes_of(architecture, model.config.to_dict(), shapes_of(model))


def cut_to(one: Subject, **changes: int) -> tuple[Any, Kept]:
    target = dataclasses.replace(one.sizes, **changes)
    statistics = one.statistics
    kept = choose(by_activation(one.model, one.architecture, statistics), one.sizes, target)
    return cut(one.model, one.architecture, one.sizes, target, kept, statistics), kept


def parameter(one: Subject, layer: int, name: str) -> torch.Tensor:
    found: torch.Tensor = one.model.get_parameter(f"model.layers.{layer}.{name}")
    return found


@every_architecture
def test_all_that_is_kept_is_the_same_model(model_type: str) -> None:
    one = subject(model_type)
    same, _ = cut_to(one)
    torch.testing.assert_close(one.logits(same), one.logits(one.model), rtol=0, atol=0)


@every_architecture
def test_the_count_is_that_of_the_model_that_comes_out(model_type: str) -> None:
    one = subject(model_type)
    tensors = tensors_of(one.architecture, shapes_of(one.model))
    smaller, _ = cut_to(one, layers=3, heads=4, kv_heads=1, ffn=40, hidden=24)
    for model in (one.model, smaller):
        counted = sum(p.numel() for p in model.parameters())
        assert tensors.parameters(measured(model)) == counted


@every_architecture
@pytest.mark.parametrize("heads,kv_heads", [(4, 1), (4, 2), (2, 1)])
def test_idle_heads_go_without_loss(model_type: str, heads: int, kv_heads: int) -> None:
    one = subject(model_type)
    busy = [[1, 3, 4, 6], [0, 2, 5, 7], [0, 1, 6, 7], [2, 3, 4, 5]]
    if kv_heads == 1:
        busy = [[4 * (layer % 2) + head for head in range(heads)] for layer in range(LAYERS)]
    with torch.no_grad():
        for layer in range(LAYERS):
            out = parameter(one, layer, "self_attn.o_proj.weight").view(HIDDEN, HEADS, HEAD)
            out[:, [head for head in range(HEADS) if head not in busy[layer]]] = 0
    smaller, kept = cut_to(one, heads=heads, kv_heads=kv_heads)
    assert [list(queries) for queries in kept.queries] == busy
    torch.testing.assert_close(one.logits(smaller), one.logits(one.model), rtol=1e-4, atol=1e-4)


@every_architecture
def test_idle_channels_of_the_ffn_go_without_loss(model_type: str) -> None:
    one = subject(model_type)
    with torch.no_grad():
        for layer in range(LAYERS):
            parameter(one, layer, "mlp.down_proj.weight")[:, layer % 3 :: 3] = 0
    smaller, _ = cut_to(one, ffn=32)
    torch.testing.assert_close(one.logits(smaller), one.logits(one.model), rtol=1e-4, atol=1e-4)


@every_architecture
def test_layers_that_turn_nothing_go_without_loss(model_type: str) -> None:
    one = subject(model_type)
    with torch.no_grad():
        for layer in (1, 2):
            for name, weight in one.model.model.layers[layer].named_parameters():
                if "o_proj" in name or "down_proj" in name:
                    weight.zero_()
    smaller, kept = cut_to(one, layers=2)
    assert kept.layers == (0, 3)
    assert [layer.self_attn.layer_idx for layer in smaller.model.layers] == [0, 1]
    torch.testing.assert_close(one.logits(smaller), one.logits(one.model), rtol=1e-4, atol=1e-4)


@every_architecture
def test_channels_of_the_hidden_state_that_are_nought_go_without_loss(model_type: str) -> None:
    one = subject(model_type)
    idle = list(range(0, HIDDEN, 4))
    with torch.no_grad():
        for name, weight in one.model.named_parameters():
            axes = one.architecture.axes_of(name)
            if axes in (("hidden", "queries"), ("hidden", "ffn")):
                weight[idle] = 0
            if name == "model.embed_tokens.weight":
                weight[:, idle] = 0
    smaller, kept = cut_to(one, hidden=24)
    assert kept.hidden == tuple(channel for channel in range(HIDDEN) if channel not in idle)
    torch.testing.assert_close(one.logits(smaller), one.logits(one.model), rtol=1e-3, atol=1e-3)


@every_architecture
def test_the_result_is_an_ordinary_model(model_type: str, tmp_path: Path) -> None:
    one = subject(model_type)
    smaller, kept = cut_to(one, layers=3, heads=4, kv_heads=1, ffn=40, hidden=24)
    smaller.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(one.logits(again), one.logits(smaller), rtol=0, atol=0)
    assert again.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=4).shape[1] > 3
    types = getattr(one.model.config, "layer_types", None)
    if types is not None:
        assert again.config.layer_types == [types[layer] for layer in kept.layers]


@pytest.mark.parametrize(
    "model_type,keys",
    [
        ("llama", {"attention_bias": True, "mlp_bias": True}),
        ("llama", {"tie_word_embeddings": True}),
        ("gemma", {"tie_word_embeddings": False}),
        ("gemma2", {"query_pre_attn_scalar": 8}),
    ],
)
def test_variants_of_an_architecture(model_type: str, keys: dict[str, Any], tmp_path: Path) -> None:
    one = subject(model_type, **keys)
    smaller, _ = cut_to(one, layers=3, heads=4, kv_heads=2, ffn=40, hidden=24)
    smaller.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(one.logits(again), one.logits(smaller), rtol=0, atol=0)


def test_an_architecture_without_a_description_names_the_file_to_add() -> None:
    with pytest.raises(InputsRefused, match=r"compress/architectures/gpt2\.toml"):
        architecture_of("gpt2", "spec.student")


def test_a_tensor_that_is_not_described_is_told() -> None:
    architecture = architecture_of("llama", "spec.student")
    with pytest.raises(InputsRefused, match=r"self_attn\.sinks, which .*llama\.toml"):
        architecture.check(["model.layers.0.self_attn.sinks"], "spec.student")


def test_a_model_that_works_elsewhere_a_layer_at_a_time_says_the_same_and_comes_back() -> None:
    """Without a GPU the other device is the same one under another name."""
    one = subject("gemma2")
    before, data = one.logits(one.model), [p.data for p in one.model.parameters()]
    here = torch.device("cpu", 0)
    assert here != next(one.model.parameters()).device
    with working_on(one.model, here):
        torch.testing.assert_close(one.logits(one.model), before, rtol=0, atol=0)
    for parameter, was in zip(one.model.parameters(), data, strict=True):
        assert parameter.data.data_ptr() == was.data_ptr()
    assert not any(layer._forward_hooks for layer in one.model.model.layers)
