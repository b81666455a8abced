"""The shard: an immutable file of teacher outputs that can be read by sample and trusts nothing.

```
magic "KDSHARD1" | header length u32 | header JSON | CRC32C of all before it u32
block:  CRC32C of the compressed bytes u32 | zstd bytes            (repeated)
footer: zstd JSON {blocks: [[offset, length, size]], samples: [[id, hash, block, offset, length]]}
CRC32C of footer u32 | footer length u32 | magic "KDSHARDE"
```
Records are keyed by (sample id, token hash), never by step, so any order, batch size or number of
ranks can read them. The SHA-256 of the whole file is kept outside, in the partition's log.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections import OrderedDict
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import BinaryIO

import google_crc32c
import zstandard

from kubedistill_trainer.teacher.errors import ShardCorrupt, StreamMismatch

FORMAT_VERSION = 2
_MAGIC = b"KDSHARD1"
_END_MAGIC = b"KDSHARDE"
_U32 = struct.Struct("<I")
_TAIL = struct.Struct("<II8s")
_BLOCK_BYTES = 1 << 20
_ZSTD_LEVEL = 1  # int8 planes gain little from more, and entropy-coded records nothing
_MAX_HEADER_BYTES = 1 << 20
_BLOCKS_KEPT = 2


def _crc(data: bytes | memoryview) -> int:
    return int(google_crc32c.value(bytes(data)))


@dataclass(frozen=True, slots=True)
class ShardSummary:
    """What the log needs to know of a finished shard."""

    size_bytes: int
    sha256: str
    count: int
    first_sample: int
    last_sample: int


class ShardWriter:
    """Writes one shard to `path`, or to memory when `path` is None.

    `stream` is the digest of the stream's identity; it is in the header, so that a shard which was
    put under a wrong name is noticed. Not thread-safe.
    """

    def __init__(
        self, stream: str, path: Path | None = None, *, block_bytes: int = _BLOCK_BYTES
    ) -> None:
        self._file: BinaryIO = BytesIO() if path is None else path.open("wb")
        self._sha256 = hashlib.sha256()
        self._size = 0
        self._block_bytes = block_bytes
        self._pending = bytearray()
        self._blocks: list[tuple[int, int, int]] = []
        self._samples: dict[int, tuple[int, int, int, int]] = {}
        self._compressor = zstandard.ZstdCompressor(level=_ZSTD_LEVEL)
        header = json.dumps({"version": FORMAT_VERSION, "stream": stream}, sort_keys=True).encode()
        head = _MAGIC + _U32.pack(len(header)) + header
        self._emit(head + _U32.pack(_crc(head)))

    @property
    def size_bytes(self) -> int:
        """Bytes so far, with what is not compressed yet counted in full."""
        return self._size + len(self._pending)

    @property
    def count(self) -> int:
        """Samples so far."""
        return len(self._samples)

    def add(self, sample: int, token_hash: int, record: bytes) -> None:
        """Append one record. ValueError when the sample is already there."""
        if sample in self._samples:
            raise ValueError(f"sample {sample} is already in this shard")
        self._samples[sample] = (token_hash, len(self._blocks), len(self._pending), len(record))
        self._pending += record
        if len(self._pending) >= self._block_bytes:
            self._end_block()

    def finish(self) -> ShardSummary:
        """Write the footer and close. ValueError when the shard is empty."""
        if not self._samples:
            raise ValueError("a shard needs at least one sample")
        self._end_block()
        index = {
            "blocks": self._blocks,
            "samples": [[sample, *entry] for sample, entry in self._samples.items()],
        }
        footer = self._compressor.compress(json.dumps(index, separators=(",", ":")).encode())
        self._emit(footer + _TAIL.pack(_crc(footer), len(footer), _END_MAGIC))
        if isinstance(self._file, BytesIO):
            self._file.seek(0)
        else:
            self._file.flush()
            self._file.close()
        samples = list(self._samples)
        return ShardSummary(
            self._size, self._sha256.hexdigest(), len(samples), samples[0], samples[-1]
        )

    def getvalue(self) -> bytes:
        """The bytes of a shard in memory."""
        if not isinstance(self._file, BytesIO):
            raise TypeError("this shard was written to a file")
        return self._file.getvalue()

    def discard(self) -> None:
        """Close without finishing; what was written is not a shard."""
        self._file.close()

    def _end_block(self) -> None:
        if not self._pending:
            return
        data = self._compressor.compress(bytes(self._pending))
        self._blocks.append((self._size, _U32.size + len(data), len(self._pending)))
        self._emit(_U32.pack(_crc(data)) + data)
        self._pending.clear()

    def _emit(self, data: bytes) -> None:
        self._file.write(data)
        self._sha256.update(data)
        self._size += len(data)


class ShardReader:
    """Random access to a shard in memory or in a file.

    Checks the frame when made and a block when it is first read; every fault is a `ShardCorrupt`
    that names the shard, the sample and what was found. Not thread-safe.
    """

    def __init__(self, source: bytes | Path, *, name: str, stream: str | None = None) -> None:
        self._name = name
        self._fd = os.open(source, os.O_RDONLY) if isinstance(source, Path) else -1
        self._data = source if isinstance(source, bytes) else b""
        self._size = os.fstat(self._fd).st_size if self._fd >= 0 else len(self._data)
        self._kept: OrderedDict[int, bytes] = OrderedDict()
        try:
            self._body = self._read_header(stream)
            self._blocks, self._samples = self._read_footer()
        except BaseException:
            self.close()
            raise

    @property
    def samples(self) -> list[int]:
        """Sample ids in the order they were written."""
        return list(self._samples)

    def read(self, sample: int, token_hash: int | None = None) -> bytes:
        """The record of `sample`.

        Raises KeyError when the shard has no such sample, StreamMismatch when the sample was made
        from other tokens, ShardCorrupt when its bytes are damaged.
        """
        found, number, offset, length = self._samples[sample]
        if token_hash is not None and found != token_hash:
            raise StreamMismatch(
                f"token hash of sample {sample} in shard {self._name}",
                f"{found:016x}",
                f"{token_hash:016x}",
            )
        if length == 0:
            return b""
        block = self._block(number, sample)
        if offset + length > len(block):
            raise ShardCorrupt(
                self._name, sample, f"record ends at {offset + length} of {len(block)} bytes"
            )
        return block[offset : offset + length]

    def close(self) -> None:
        """Release the file; harmless when repeated."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> ShardReader:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _bytes(self, offset: int, length: int) -> bytes:
        if self._fd < 0:
            return self._data[offset : offset + length]
        return os.pread(self._fd, length, offset)

    def _read_header(self, stream: str | None) -> int:
        """Offset of the first block."""
        fixed = self._bytes(0, len(_MAGIC) + _U32.size)
        if len(fixed) < len(_MAGIC) + _U32.size or not fixed.startswith(_MAGIC):
            raise ShardCorrupt(self._name, None, f"starts with {fixed[:8]!r}, not {_MAGIC!r}")
        (length,) = _U32.unpack_from(fixed, len(_MAGIC))
        if length > min(_MAX_HEADER_BYTES, self._size):
            raise ShardCorrupt(self._name, None, f"header of {length} in {self._size} bytes")
        rest = self._bytes(len(fixed), length + _U32.size)
        if len(rest) < length + _U32.size:
            raise ShardCorrupt(self._name, None, f"header ends after {len(rest)} bytes")
        self._verify(fixed + rest[:length], _U32.unpack_from(rest, length)[0], None, "header")
        header = json.loads(rest[:length])
        if header["version"] != FORMAT_VERSION:
            raise StreamMismatch(
                f"format version of shard {self._name}", header["version"], FORMAT_VERSION
            )
        if stream is not None and header["stream"] != stream:
            raise StreamMismatch(f"stream of shard {self._name}", header["stream"], stream)
        return len(fixed) + len(rest)

    def _read_footer(
        self,
    ) -> tuple[list[tuple[int, int, int]], dict[int, tuple[int, int, int, int]]]:
        tail = self._bytes(max(self._size - _TAIL.size, 0), _TAIL.size)
        if len(tail) < _TAIL.size or not tail.endswith(_END_MAGIC):
            raise ShardCorrupt(
                self._name, None, f"{self._size} bytes end with {tail[-8:]!r}: cut short"
            )
        crc, length, _ = _TAIL.unpack(tail)
        start = self._size - _TAIL.size - length
        if start < self._body:
            raise ShardCorrupt(self._name, None, f"footer of {length} in {self._size} bytes")
        footer = self._bytes(start, length)
        self._verify(footer, crc, None, "footer")
        index = json.loads(zstandard.ZstdDecompressor().decompress(footer))
        return (
            [(int(a), int(b), int(c)) for a, b, c in index["blocks"]],
            {int(s): (int(h), int(b), int(o), int(n)) for s, h, b, o, n in index["samples"]},
        )

    def _block(self, number: int, sample: int) -> bytes:
        if (kept := self._kept.get(number)) is not None:
            self._kept.move_to_end(number)
            return kept
        offset, length, size = self._blocks[number]
        data = self._bytes(offset, length)
        if len(data) < length:
            raise ShardCorrupt(
                self._name, sample, f"block {number} has {len(data)} of {length} bytes"
            )
        compressed = data[_U32.size :]
        self._verify(compressed, _U32.unpack_from(data)[0], sample, f"block {number}")
        try:
            block = zstandard.ZstdDecompressor().decompress(compressed, max_output_size=size)
        except zstandard.ZstdError as error:
            raise ShardCorrupt(self._name, sample, f"block {number}: {error}") from error
        self._kept[number] = block
        if len(self._kept) > _BLOCKS_KEPT:
            self._kept.popitem(last=False)
        return block

    def _verify(self, data: bytes, wanted: int, sample: int | None, part: str) -> None:
        found = _crc(data)
        if found != wanted:
            raise ShardCorrupt(
                self._name, sample, f"CRC32C of {part} is {found:08x}, {wanted:08x} was written"
            )
