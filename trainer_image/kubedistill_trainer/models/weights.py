"""Weights that no training ever made: all zero, NaN or infinite. Read as files, without torch.

A safetensors file is the size of its header (8 bytes, little-endian), the header (JSON: name →
dtype, shape, data_offsets) and the tensors. The largest absolute value of a tensor says both: it is
zero, or it is not finite. Of a float without its sign bit it is a comparison of integers, so that
BF16, which numpy does not know, needs no code of its own.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np

from kubedistill_trainer.failures import InputsRefused, unreadable
from kubedistill_trainer.models.shapes import check_shapes, is_vocabulary, layer_of
from kubedistill_trainer.store import Store

_PREFIX_BYTES = 8
_FIRST_READ_BYTES = 64 << 10
"""Holds the header of most files, so that one request is enough."""
_HEADER_LIMIT_BYTES = 100_000_000
"""The format's own limit."""
_PIECES, _PIECE_BYTES = 4, 64 << 10
"""What a sample takes of a tensor: so many pieces, evenly spread. Padded rows are at the end."""
_LAYER_MATRICES = 8
"""Of a layer's matrices, which of a mixture of experts may be hundreds."""
_CHUNK_BYTES = 32 << 20
_SUFFIX = ".safetensors"
_SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"

Verdict = Literal["zero", "not finite", "sound"]
ReadRange = Callable[[int, int], bytes]
"""(start, length) → bytes of a file, fewer where it ends."""


@dataclass(frozen=True)
class _Format:
    """A type as unsigned integers: the bits that are no sign, and from which on it is no number."""

    integer: str
    magnitude: int
    infinite: int | None


_FORMATS = {
    "F64": _Format("<u8", 0x7FFF_FFFF_FFFF_FFFF, 0x7FF0_0000_0000_0000),
    "F32": _Format("<u4", 0x7FFF_FFFF, 0x7F80_0000),
    "F16": _Format("<u2", 0x7FFF, 0x7C00),
    "BF16": _Format("<u2", 0x7FFF, 0x7F80),
    "F8_E4M3": _Format("u1", 0x7F, 0x7F),
    "F8_E5M2": _Format("u1", 0x7F, 0x7C),
}
_BYTES = _Format("u1", 0xFF, None)
"""Integers are always numbers; they are zero where all their bytes are."""


@dataclass(frozen=True)
class Tensor:
    """Where a tensor lies: `start` counts from the beginning of its file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: str
    start: int
    size_bytes: int

    @property
    def is_matrix(self) -> bool:
        """Biases and the weights of norms may be zero; what multiplies states may not."""
        return len(self.shape) >= 2 and self.size_bytes > 0


def check_sample(store: Store, config: Mapping[str, Any], field: str) -> None:
    """Refuse a model folder in S3 whose files do not make the model of its `config`, or that a few
    pieces of a few tensors already tell is dead.

    Read are the headers, and some 256 KiB each of the matrices over the vocabulary (embedding, LM
    head) and of those of three layers. InputsRefused (unreadable) names `field`, the folder and the
    tensor.
    """
    tensors = tensors_in(store, field)
    check_shapes({tensor.name: tensor.shape for tensor in tensors}, config, field, store.uri)
    verdicts = [
        (tensor, _verdict(tensor.dtype, _pieces(store, tensor))) for tensor in sample_of(tensors)
    ]
    _refuse_dead(verdicts, field, store.uri)


def tensors_in(store: Store, field: str) -> list[Tensor]:
    """What the headers of a model folder's files say. InputsRefused where there is no model."""
    sizes = {info.key: info.size_bytes for info in store.list("") if "/" not in info.key}
    index = store.get(INDEX) if INDEX in sizes else None
    tensors: list[Tensor] = []
    for name in weight_files(sizes, index, field, store.uri):
        with _naming(field, store.uri_of(name)):
            tensors += read_header(name, sizes[name], partial(store.get_range, name))
    return tensors


def check_files(folder: Path, field: str, uri: str) -> None:
    """Refuse a downloaded model folder, after looking at every number of it; `uri`: whence."""
    index = folder / INDEX
    names = {path.name for path in folder.iterdir()}
    verdicts: list[tuple[Tensor, Verdict]] = []
    for name in weight_files(names, index.read_bytes() if INDEX in names else None, field, uri):
        path = folder / name
        with path.open("rb") as file, _naming(field, f"{uri}/{name}"):
            read = partial(_read_at, file.fileno())
            tensors = read_header(name, path.stat().st_size, read)
            verdicts += [(t, _verdict(t.dtype, _chunks(read, t))) for t in tensors]
    _refuse_dead(verdicts, field, uri)


def weight_files(names: Collection[str], index: bytes | None, field: str, uri: str) -> list[str]:
    """The files of a folder that hold the model: those that its index names, or its only one.

    What else lies there (an optimizer's state, what another tool wrote) is nobody's business.
    InputsRefused where one is missing, and where nothing says which ones they are.
    """
    if index is not None:
        return _named_by(index, names, field, uri)
    if _SINGLE in names:
        return [_SINGLE]
    found = sorted(name for name in names if name.endswith(_SUFFIX))
    if not found:
        raise no_weights(field, uri)
    raise unreadable(
        field,
        f"{_and_more(found)} in {uri}, and neither {_SINGLE} nor {INDEX}",
        f"upload {INDEX} too: it says what lies in which file",
    )


def _named_by(index: bytes, names: Collection[str], field: str, uri: str) -> list[str]:
    with _naming(field, f"{uri}/{INDEX}"):
        content = json.loads(index)
    files = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(files, dict) or not files:
        raise _no_index(field, uri, "no weight_map with a tensor in it")
    for tensor, name in files.items():
        if not isinstance(name, str) or not name.endswith(_SUFFIX):
            raise _no_index(field, uri, f"{tensor} in {name!r}, which is no {_SUFFIX} file")
    named = sorted(set(files.values()))
    missing = [name for name in named if name not in names]
    if missing:
        raise unreadable(
            field,
            f"no {_and_more(missing)} in {uri}, of {len(named)} that {INDEX} names",
            "upload all of the model's files",
        )
    return named


def _no_index(field: str, uri: str, found: str) -> InputsRefused:
    return unreadable(field, f"{uri}/{INDEX} with {found}", "upload the model's files again")


def _and_more(names: Sequence[str]) -> str:
    return names[0] + (f" and {len(names) - 1} more" if len(names) > 1 else "")


def no_weights(field: str, uri: str) -> InputsRefused:
    """A folder without safetensors."""
    return unreadable(
        field,
        f"no {_SUFFIX} file in {uri}",
        "give a folder with safetensors weights (pickled weights are never loaded)",
    )


def read_header(name: str, size_bytes: int, read: ReadRange) -> list[Tensor]:
    """The tensors of one safetensors file of `size_bytes`. ValueError where it is none, or cut."""
    first = read(0, min(_FIRST_READ_BYTES, size_bytes))
    if len(first) < _PREFIX_BYTES:
        raise ValueError(f"{size_bytes} bytes")
    (length,) = struct.unpack("<Q", first[:_PREFIX_BYTES])
    if length > min(_HEADER_LIMIT_BYTES, size_bytes - _PREFIX_BYTES):
        raise ValueError(f"a header of {length} bytes in a file of {size_bytes}")
    header = first[_PREFIX_BYTES : _PREFIX_BYTES + length]
    if len(header) < length:
        header += read(_PREFIX_BYTES + len(header), length - len(header))
    entries = json.loads(header)
    entries.pop("__metadata__", None)
    data = _PREFIX_BYTES + length
    found = [
        Tensor(key, e["dtype"], tuple(e["shape"]), name, data + e["data_offsets"][0],
               e["data_offsets"][1] - e["data_offsets"][0])
        for key, e in entries.items()
    ]  # fmt: skip
    end = max((t.start + t.size_bytes for t in found), default=data)
    if end > size_bytes:
        raise ValueError(f"{size_bytes} bytes, and {end} were written: it is cut off")
    return found


def vocabulary_rows(config: Mapping[str, Any]) -> int | None:
    """Rows of the embedding and of the LM head, by a model's config."""
    rows = config.get("vocab_size")
    return rows if isinstance(rows, int) else None


def sample_of(tensors: Iterable[Tensor]) -> list[Tensor]:
    """The matrices over the vocabulary, those of the first, a middle and the last layer, and a few
    that are neither."""
    vocabulary: list[Tensor] = []
    others: list[Tensor] = []
    layers: dict[int, list[Tensor]] = {}
    for tensor in tensors:
        layer = layer_of(tensor.name)
        if not tensor.is_matrix:
            continue
        if is_vocabulary(tensor.name):
            vocabulary.append(tensor)
        elif layer is None:
            others.append(tensor)
        else:
            layers.setdefault(layer, []).append(tensor)
    numbers = sorted(layers)
    chosen = {numbers[i] for i in (0, len(numbers) // 2, -1)} if numbers else set()
    inner = [t for number in sorted(chosen) for t in layers[number][:_LAYER_MATRICES]]
    return vocabulary + inner + others[:_LAYER_MATRICES]


def _refuse_dead(verdicts: Iterable[tuple[Tensor, Verdict]], field: str, uri: str) -> None:
    """One message for the first tensor that shows that nothing can be learnt of this model."""
    matrices: list[tuple[Tensor, Verdict]] = []
    for tensor, verdict in verdicts:
        if verdict == "not finite":
            raise unreadable(
                field,
                f"NaN or infinity in {tensor.name} ({tensor.file}) of {uri}",
                "give a model with finite weights, such as an earlier checkpoint of it",
            )
        if tensor.is_matrix:
            matrices.append((tensor, verdict))
    vocabulary = [one for one in matrices if is_vocabulary(one[0].name)]
    layers = [one for one in matrices if layer_of(one[0].name) is not None]
    zero = next((tensor for tensor, verdict in vocabulary if verdict == "zero"), None)
    others = ""
    for kind, group in (("matrix", matrices), ("matrix of a layer", layers)):
        if zero is None and group and all(verdict == "zero" for _, verdict in group):
            zero = group[0][0]
            others = f", and every other {kind} of {len(group)} that were read"
    if zero is not None:
        raise unreadable(
            field,
            f"only zeros in {zero.name} ({zero.file}){others} of {uri}",
            "give a model with trained weights: this folder was not written whole",
        )


def _verdict(dtype: str, parts: Iterable[bytes]) -> Verdict:
    known = _FORMATS.get(dtype, _BYTES)
    zero = True
    for part in parts:
        whole = len(part) - len(part) % np.dtype(known.integer).itemsize
        bits = np.frombuffer(part[:whole], known.integer) & known.magnitude
        largest = int(bits.max(initial=0))
        zero = zero and largest == 0
        if known.infinite is not None and largest >= known.infinite:
            return "not finite"
    return "zero" if zero else "sound"


def _pieces(store: Store, tensor: Tensor) -> Iterator[bytes]:
    """A few pieces of a tensor, each from the beginning of a number."""
    if tensor.size_bytes <= _PIECES * _PIECE_BYTES:
        yield store.get_range(tensor.file, tensor.start, tensor.size_bytes)
        return
    for piece in range(_PIECES):
        # Eight bytes are a whole number of numbers of every type.
        offset = tensor.size_bytes * piece // _PIECES // 8 * 8
        yield store.get_range(tensor.file, tensor.start + offset, _PIECE_BYTES)


def _read_at(descriptor: int, start: int, length: int) -> bytes:
    return os.pread(descriptor, length, start)


def _chunks(read: ReadRange, tensor: Tensor) -> Iterator[bytes]:
    for offset in range(0, tensor.size_bytes, _CHUNK_BYTES):
        yield read(tensor.start + offset, min(_CHUNK_BYTES, tensor.size_bytes - offset))


@contextmanager
def _naming(field: str, uri: str) -> Iterator[None]:
    """Turns what a broken header raises into one message about the file."""
    try:
        yield
    except (
        ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError,
    ) as error:  # fmt: skip
        raise unreadable(
            field, f"no safetensors in {uri}: {error}", "upload the model's files again"
        ) from error
