"""Failures that end a container, each with its exit code and the words that are reported."""

from __future__ import annotations

from collections.abc import Sequence

from kubedistill_api.exit_codes import ExitCode
from kubedistill_api.runspec import Problem


class RunFailure(Exception):
    """The run ends with `code`; the message is for the person who owns the object."""

    def __init__(self, code: ExitCode, message: str, problems: Sequence[Problem] = ()) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.problems = list(problems)


class InputsRefused(RunFailure):
    """The inputs cannot work: each problem names a field, what was found and what to write."""

    def __init__(
        self, problems: Sequence[Problem], code: ExitCode = ExitCode.BAD_CONFIGURATION
    ) -> None:
        super().__init__(code, "; ".join(p.sentence() for p in problems), problems)


def refuse(field: str, found: str, expected: str) -> InputsRefused:
    """One problem of the spec."""
    return InputsRefused([Problem(field=field, found=found, expected=expected)])


def unreadable(field: str, found: str, expected: str) -> InputsRefused:
    """One problem of what the spec points at."""
    problem = Problem(field=field, found=found, expected=expected)
    return InputsRefused([problem], ExitCode.UNREADABLE_INPUT)
