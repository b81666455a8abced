"""Dead weights are refused: by a sample in the store before training, whole once they are here."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kubedistill_trainer.failures import InputsRefused
from kubedistill_trainer.models import weights
from kubedistill_trainer.models.folder import download
from kubedistill_trainer.store import Store
from s3_fixture import S3Server, s3  # noqa: F401  (s3 is a fixture)
from safetensors.torch import load_file, save, save_file

ROWS, WIDTH, LAYERS = 4096, 96, 5
CONFIG = {"model_type": "llama", "vocab_size": ROWS}
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
MATRICES = ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj")
Tensors = dict[str, torch.Tensor]


def model() -> Tensors:
    """Large enough that a sample is a part of it: the vocabulary's matrices are 1.5 MiB each."""
    torch.manual_seed(0)
    found = {EMBEDDING: torch.randn(ROWS, WIDTH), HEAD: torch.randn(ROWS, WIDTH)}
    for layer in range(LAYERS):
        for name in MATRICES:
            found[f"model.layers.{layer}.{name}.weight"] = torch.randn(WIDTH, WIDTH)
        found[f"model.layers.{layer}.input_layernorm.weight"] = torch.ones(WIDTH)
        found[f"model.layers.{layer}.input_layernorm.bias"] = torch.zeros(WIDTH)
    return found


def put(store: Store, tensors: Tensors, config: dict[str, Any] = CONFIG) -> None:
    """In two files, as large models are."""
    names = sorted(tensors)
    for index, part in enumerate((names[::2], names[1::2])):
        content = save({name: tensors[name].contiguous() for name in part})
        store.put(f"model-{index + 1:05}-of-00002.safetensors", content)
    store.put("config.json", json.dumps(config).encode())
    files = {name: f"model-{i % 2 + 1:05}-of-00002.safetensors" for i, name in enumerate(names)}
    store.put("model.safetensors.index.json", json.dumps({"weight_map": files}).encode())


def zero(*names: str) -> Callable[[Tensors], object]:
    return lambda tensors: [tensors[name].zero_() for name in names]


def fill(name: str, row: int, value: float) -> Callable[[Tensors], object]:
    def change(tensors: Tensors) -> None:
        tensors[name][row, 3] = value

    return change


def all_zero(tensors: Tensors) -> None:
    for tensor in tensors.values():
        if tensor.dim() > 1:
            tensor.zero_()


def all_zero_but_the_vocabulary(tensors: Tensors) -> None:
    for name, tensor in tensors.items():
        if tensor.dim() > 1 and name not in (EMBEDDING, HEAD):
            tensor.zero_()


MIDDLE = "model.layers.2.self_attn.q_proj.weight"
SEEN_AT_ONCE = {
    "embedding": (zero(EMBEDDING), f"only zeros in {EMBEDDING}"),
    "head": (zero(HEAD), f"only zeros in {HEAD}"),
    "all": (all_zero, "only zeros in"),
    "the layers": (
        all_zero_but_the_vocabulary,
        "only zeros in model.layers.0.mlp.up_proj.weight (model-00001-of-00002.safetensors), and "
        "every other matrix of a layer of",
    ),
    "nan": (fill(MIDDLE, 0, float("nan")), f"NaN or infinity in {MIDDLE}"),
    "infinity": (fill(EMBEDDING, 2, float("-inf")), f"NaN or infinity in {EMBEDDING}"),
}
NOT_IN_THE_SAMPLE = {
    "deep in a matrix": (fill(EMBEDDING, 900, float("nan")), f"NaN or infinity in {EMBEDDING}"),
    "in another layer": (
        fill("model.layers.1.mlp.up_proj.weight", 5, float("inf")),
        "NaN or infinity in model.layers.1.mlp.up_proj.weight",
    ),
}
SOUND: dict[str, Callable[[Tensors], object]] = {
    "as trained": lambda _: None,
    "one matrix of a layer": zero("model.layers.2.self_attn.o_proj.weight"),
    "one layer": zero(*(f"model.layers.0.{m}.weight" for m in MATRICES)),
    "nearly all of each": zero(
        *(f"model.layers.{n}.{m}.weight" for n in range(LAYERS) for m in MATRICES[1:])
    ),
    "padded rows": lambda tensors: tensors[EMBEDDING][ROWS // 3 :].zero_(),
    "the first rows": lambda tensors: tensors[HEAD][: ROWS // 5].zero_(),
    "norms": zero(*(f"model.layers.{n}.input_layernorm.weight" for n in range(LAYERS))),
}


@pytest.fixture
def store(s3: S3Server) -> Store:  # noqa: F811
    return s3.store()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", SEEN_AT_ONCE)
def test_a_sample_tells_a_dead_model(
    store: Store, tmp_path: Path, name: str, dtype: torch.dtype
) -> None:
    change, words = SEEN_AT_ONCE[name]
    tensors = model()
    change(tensors)
    put(store, {name: tensor.to(dtype) for name, tensor in tensors.items()})
    with pytest.raises(InputsRefused) as early:
        weights.check_sample(store, CONFIG, "spec.teacher")
    with pytest.raises(InputsRefused) as late:
        download(store, tmp_path / "got", "spec.teacher")
    for refused in (early, late):
        [problem] = refused.value.problems
        assert problem.field == "spec.teacher"
        assert words in problem.found
        assert store.uri in problem.found


@pytest.mark.parametrize("name", NOT_IN_THE_SAMPLE)
def test_every_number_is_looked_at_once_it_is_here(store: Store, tmp_path: Path, name: str) -> None:
    change, words = NOT_IN_THE_SAMPLE[name]
    tensors = model()
    change(tensors)
    put(store, tensors)
    weights.check_sample(store, CONFIG, "spec.student")
    with pytest.raises(InputsRefused, match=words):
        download(store, tmp_path / "got", "spec.student")


@pytest.mark.parametrize("name", SOUND)
def test_zeros_that_a_model_may_have(store: Store, tmp_path: Path, name: str) -> None:
    tensors = model()
    SOUND[name](tensors)
    put(store, tensors)
    weights.check_sample(store, CONFIG, "spec.teacher")
    download(store, tmp_path / "got", "spec.teacher")


def test_a_layer_as_wide_as_the_vocabulary(store: Store) -> None:
    tensors = model()
    tensors[EMBEDDING], tensors[HEAD] = torch.randn(WIDTH, WIDTH), torch.randn(WIDTH, WIDTH)
    zero("model.layers.2.self_attn.o_proj.weight")(tensors)
    put(store, tensors, {"vocab_size": WIDTH})
    weights.check_sample(store, {"vocab_size": WIDTH}, "spec.teacher")
    zero(HEAD)(tensors)
    put(store, tensors)
    with pytest.raises(InputsRefused, match=f"only zeros in {HEAD}"):
        weights.check_sample(store, {}, "spec.teacher")


def test_only_the_models_own_files_are_looked_at(store: Store, tmp_path: Path) -> None:
    tensors = model()
    put(store, tensors)
    store.put("optimizer.safetensors", save({"x": torch.full((4, 4), float("nan"))}))
    store.put("model.safetensors", save({name: t * 0 for name, t in tensors.items()}))
    weights.check_sample(store, CONFIG, "spec.teacher")
    download(store, tmp_path / "got", "spec.teacher")


def test_shards_without_an_index(store: Store, tmp_path: Path) -> None:
    put(store, model())
    store.delete(["model.safetensors.index.json"])
    with pytest.raises(InputsRefused) as early:
        weights.check_sample(store, CONFIG, "spec.teacher")
    with pytest.raises(InputsRefused) as late:
        download(store, tmp_path / "got", "spec.teacher")
    for refused in (early, late):
        assert refused.value.problems[0].found == (
            f"model-00001-of-00002.safetensors and 1 more in {store.uri}, and neither "
            "model.safetensors nor model.safetensors.index.json"
        )


def test_a_folder_without_weights(store: Store) -> None:
    store.put("config.json", b"{}")
    with pytest.raises(InputsRefused, match="pickled weights are never loaded"):
        weights.check_sample(store, CONFIG, "spec.teacher")


def test_a_file_that_the_index_names_is_missing(store: Store) -> None:
    put(store, model())
    store.delete(["model-00002-of-00002.safetensors"])
    with pytest.raises(InputsRefused) as refused:
        weights.check_sample(store, CONFIG, "spec.teacher")
    [problem] = refused.value.problems
    assert problem.found == (
        f"no model-00002-of-00002.safetensors in {store.uri}, of 2 that "
        "model.safetensors.index.json names"
    )


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"{", "no safetensors in s3://"),
        (b"[" * 100_000, "no safetensors in s3://"),
        (b"[]", "with no weight_map with a tensor in it"),
        (b"{}", "with no weight_map with a tensor in it"),
        (b'{"weight_map": 1}', "with no weight_map with a tensor in it"),
        (b'{"weight_map": {}}', "with no weight_map with a tensor in it"),
        (b'{"weight_map": {"a": 5, "b": "x"}}', "with a in 5, which is no .safetensors file"),
        (b'{"weight_map": {"a": "x.bin"}}', "with a in 'x.bin', which is no .safetensors file"),
        (b'{"weight_map": {"a": "sub/x.safetensors"}}', "no sub/x.safetensors in s3://"),
    ],
)
def test_an_index_that_is_none(store: Store, content: bytes, words: str) -> None:
    put(store, model())
    store.put("model.safetensors.index.json", content)
    with pytest.raises(InputsRefused) as refused:
        weights.check_sample(store, CONFIG, "spec.teacher")
    [problem] = refused.value.problems
    assert words in problem.found and "model.safetensors.index.json" in problem.found


SIZES = {"vocab_size": ROWS, "hidden_size": WIDTH, "num_hidden_layers": LAYERS}
OTHER_SIZES = {
    "vocab_size": (ROWS + 8, f"{ROWS} rows in {HEAD} of "),
    "hidden_size": (2 * WIDTH, f"{WIDTH} columns in {EMBEDDING} of "),
    "num_hidden_layers": (LAYERS + 1, f"no tensor of model.layers.{LAYERS} of "),
}


@pytest.mark.parametrize("key", OTHER_SIZES)
def test_a_config_of_another_model(store: Store, key: str) -> None:
    size, words = OTHER_SIZES[key]
    put(store, model())
    weights.check_sample(store, SIZES, "spec.teacher")
    with pytest.raises(InputsRefused) as refused:
        weights.check_sample(store, SIZES | {key: size}, "spec.teacher")
    [problem] = refused.value.problems
    assert problem.found == f"{words}{store.uri}, whose config.json says {key} {size}"


WHOLE = save({"a": torch.ones(64, 64)})


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "0 bytes"),
        (b"PK\x03\x04 a zip file", "a header of"),
        (WHOLE[:-1], "it is cut off"),
        (WHOLE[:40], "a header of"),
        (struct.pack("<Q", 2) + b"[]", "no safetensors in"),
        (struct.pack("<Q", 8) + b'{"a": 1}', "no safetensors in"),
        (struct.pack("<Q", 4) + b"{{{{", "no safetensors in"),
    ],
)
def test_what_is_no_safetensors_file(
    store: Store, tmp_path: Path, content: bytes, words: str
) -> None:
    store.put("model.safetensors", content)
    store.put("config.json", b"{}")
    with pytest.raises(InputsRefused, match="upload the model's files again") as early:
        weights.check_sample(store, CONFIG, "spec.teacher")
    with pytest.raises(InputsRefused) as late:
        download(store, tmp_path / "got", "spec.teacher")
    for refused in (early, late):
        assert words in refused.value.problems[0].found
        assert "model.safetensors" in refused.value.problems[0].found


def test_a_header_longer_than_the_first_read(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    names = [f"model.layers.{n}.a.very.long.name.of.a.tensor.weight" for n in range(2000)]
    save_file({name: torch.full((2, 2), float(i)) for i, name in enumerate(names)}, path)
    content = path.read_bytes()

    def read(start: int, length: int) -> bytes:
        return content[start : start + length]

    found = {t.name: t for t in weights.read_header("m", len(content), read)}
    assert set(found) == set(load_file(path))
    for index in (0, 77, 1999):
        place = found[names[index]]
        assert read(place.start, place.size_bytes) == struct.pack("<4f", *[float(index)] * 4)


DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip


@given(dtype=st.sampled_from(sorted(DTYPES)), content=st.binary(min_size=8, max_size=8))
def test_every_pattern_of_bits_is_what_torch_finds(dtype: str, content: bytes) -> None:
    values = torch.frombuffer(bytearray(content), dtype=DTYPES[dtype]).double()
    wanted = "sound" if torch.isfinite(values).all() else "not finite"
    if not values.abs().any():
        wanted = "zero"
    assert weights._verdict(dtype, [content]) == wanted


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [0.0, -0.0, 1.0, -2.0, float("nan"), float("inf"), -float("inf")])
def test_special_values(dtype: str, value: float) -> None:
    values = torch.tensor([value] * 3, dtype=torch.float64).to(DTYPES[dtype])
    content = values.view(torch.uint8).numpy().tobytes()
    wide = values.double()
    wanted = "zero" if not wide.abs().any() else "sound"
    if not torch.isfinite(wide).all():
        wanted = "not finite"
    assert weights._verdict(dtype, [content]) == wanted
    assert weights._verdict("I8", [bytes(3)]) == "zero"
