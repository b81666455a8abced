"""What can go wrong with a teacher stream, in words for the person who has to mend it."""

from __future__ import annotations


class StreamError(Exception):
    """Base of every error of this package."""


class ShardCorrupt(StreamError):
    """A shard's bytes are not what its writer wrote.

    `shard` names the shard, `sample` the sample id that was asked for (None when the fault is in
    the shard's frame), `found` what was seen.
    """

    def __init__(self, shard: str, sample: int | None, found: str) -> None:
        super().__init__(shard, sample, found)
        self.shard = shard
        self.sample = sample
        self.found = found

    def __str__(self) -> str:
        where = "" if self.sample is None else f", sample {self.sample}"
        return f"shard {self.shard}{where}: {self.found}"


class StreamCorrupt(StreamError):
    """A manifest or a log stays wrong after re-reads: what they say cannot be made again."""

    def __init__(self, uri: str, found: str) -> None:
        super().__init__(uri, found)
        self.uri = uri
        self.found = found

    def __str__(self) -> str:
        return (
            f"{self.uri}: {self.found}. Delete the stream's prefix to have it written again; "
            "nothing of it was used"
        )


class StreamDamaged(StreamError):
    """A shard or the head is missing or not what was committed, and a teacher is asked to write it.

    Nothing of it was used. A run that meets it after the teacher has written again goes on.
    """

    def __init__(self, uri: str, found: str) -> None:
        super().__init__(uri, found)
        self.uri = uri
        self.found = found

    def __str__(self) -> str:
        return f"{self.uri}: {self.found}; the teacher is asked to write it again"


class StreamMismatch(StreamError):
    """A stream, or one of its samples, was made from something else than what is wanted."""

    def __init__(self, field: str, found: object, wanted: object) -> None:
        super().__init__(field, found, wanted)
        self.field = field
        self.found = found
        self.wanted = wanted

    def __str__(self) -> str:
        return (
            f"the teacher's stream was made for something else: its {self.field} is {self.found}, "
            f"this job needs {self.wanted}; delete that stream, so that it is written anew, or "
            "give the job another spec.storage.uri"
        )


class StreamStalled(StreamError):
    """No new commit of a partition within the deadline."""


class StreamClosed(StreamError):
    """The reader was closed while it waited."""


class SampleMissing(StreamError):
    """The stream has ended and the sample is not in it."""
