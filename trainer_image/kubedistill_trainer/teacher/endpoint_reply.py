"""What a server's reply means: an answer, trouble that may pass, one prompt's refusal, or the end."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from kubedistill_trainer.failures import InputsRefused, refuse

FIELD = "spec.teacher.endpoint"
MAX_TOKENS = "spec.distill.generation.maxTokens"
SEED = "seed"
"""Not every server knows it, and one can do without."""
LOGPROBS = "logprobs"
"""The same; some say so with 403."""
_FOUND_LIMIT = 300
_PASSING = frozenset({408, 409, 421, 423, 425, 429})
_ABOUT_REQUEST = frozenset({400, 413, 415, 422, 451})
_NO_CREDIT = frozenset({"insufficient_quota", "billing_hard_limit_reached", "account_deactivated"})
_SETTINGS = {
    "max_tokens": MAX_TOKENS,
    "max_completion_tokens": MAX_TOKENS,
    "temperature": "spec.distill.generation.temperature",
    "top_p": "spec.distill.generation.topP",
    SEED: "spec.teacher.endpoint.url",
    "prompt_logprobs": "spec.teacher.topK",
    LOGPROBS: "spec.teacher.topK",
}
_ABOUT_KEY = re.compile(
    r"(invalid|incorrect|missing|expired|unknown|wrong|revoked|no|valid) api.?key"
    r"|api.?key (is )?(not valid|not found|not provided|invalid|incorrect|missing|expired|required"
    r"|revoked|disabled)|invalid.api.key",
    re.I,
)
_ABOUT_MODEL = re.compile(
    r"(invalid|unknown|unsupported|not a valid|no such) model\b"
    r"|\bmodel\b( [^ ]{1,256})? (is |was )?(not found|does not exist|not available|not a valid model)",
    re.I,
)
_ABOUT = {name: re.compile(rf"\b{name}\b", re.I) for name in (SEED, LOGPROBS)}
"""How servers name what they do not take where they give no `param`."""
TOO_LONG = re.compile(r"context.{0,10}(length|window|limit|size)|too long|too many tokens", re.I)
_MONTH, _DAY = "(0[1-9]|1[0-2])", "(0[1-9]|[12]\\d|3[01])"
_DATE = rf"20\d\d{_MONTH}{_DAY}|20\d\d-{_MONTH}-{_DAY}|{_MONTH}{_DAY}|2\d{_MONTH}"
"""As `20240806`, `2024-08-06`, `0613` and `2411`; any other number may be a size."""
_VERSION = re.compile(rf"[-@:]v?({_DATE})(-preview)?")
_MAYBE_HALF = re.compile(rb"\\u[dD][89a-fA-F]|\xed[\xa0-\xbf]")
_HALF = re.compile("[\ud800-\udfff]")
_MOST_TOKENS = 1 << 40


@dataclass(frozen=True)
class Reply:
    """A whole HTTP answer. `headers` are found by lower-case names."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    def json(self) -> Any:
        """The body's JSON. Again when it is none: a body may be cut on its way."""
        try:
            return _parsed(self.body)
        except (ValueError, RecursionError) as error:
            raise Again(
                "unreadable", f"a body that is not JSON ({len(self.body)} bytes)"
            ) from error


class Again(Exception):
    """Trouble that may pass. `kind`: a word for metrics; `found`: what was seen.

    `wait_seconds`: what the server asked for; `everybody`: whether it is true of all requests.
    """

    def __init__(
        self, kind: str, found: str, wait_seconds: float | None = None, everybody: bool = False
    ) -> None:
        super().__init__(found)
        self.kind = kind
        self.found = found
        self.wait_seconds = wait_seconds
        self.everybody = everybody


class PromptRefused(Exception):
    """The server will never answer this one prompt; the text says why.

    `prompt_tokens`, `answer_tokens`: what it counted all the same.
    """

    def __init__(self, why: str, prompt_tokens: int = 0, answer_tokens: int = 0) -> None:
        super().__init__(why)
        self.prompt_tokens = prompt_tokens
        self.answer_tokens = answer_tokens


class SettingRefused(InputsRefused):
    """The server does not take a setting. `setting`: its name there; `said`: the server's words."""

    def __init__(self, refusal: InputsRefused, setting: str, said: str) -> None:
        super().__init__(refusal.problems, refusal.code)
        self.setting = setting
        self.said = said


@dataclass(frozen=True)
class Complaint:
    """What a server says of a request that it did not answer; empty where it does not say."""

    message: str
    code: str = ""
    setting: str = ""


def complaint_of(body: bytes) -> Complaint:
    """Of OpenAI's `{"error": {…}}`, Google's list of one, the bare object, FastAPI's `detail`, or any
    text."""
    text = " ".join(body[: 4 * _FOUND_LIMIT].decode(errors="replace").split())
    try:
        return _complaint(_parsed(body), text)
    except (ValueError, RecursionError):
        return Complaint(text[:_FOUND_LIMIT])


def _complaint(found: Any, text: str) -> Complaint:
    if isinstance(found, list) and len(found) == 1:
        [found] = found
    if isinstance(found, dict) and isinstance(found.get("error"), dict):
        found = found["error"]
    if not isinstance(found, dict):
        return Complaint(text[:_FOUND_LIMIT])
    said = next((found[k] for k in ("message", "error", "detail") if found.get(k)), text)
    code, kind = found.get("code"), found.get("type")
    return Complaint(
        " ".join(str(said).split())[:_FOUND_LIMIT],
        code if isinstance(code, str) else str(kind or ""),
        str(found.get("param") or ""),
    )


def _parsed(body: bytes) -> Any:
    """The body's JSON, each half of a character that has lost the other as U+FFFD: such a text can be
    neither written nor sent. ValueError for no JSON, RecursionError for what is nested too deeply."""
    found = json.loads(body)
    return _without_halves(found) if _MAYBE_HALF.search(body) else found


def _without_halves(found: Any) -> Any:
    if isinstance(found, str):
        return _HALF.sub("\ufffd", found)
    if isinstance(found, list):
        return [_without_halves(one) for one in found]
    if isinstance(found, dict):
        return {_without_halves(name): _without_halves(one) for name, one in found.items()}
    return found


def check_status(reply: Reply, url: str, model: str, wait_seconds: float | None) -> None:
    """Nothing for an answer.

    Again for trouble that may pass, PromptRefused where it is about what was asked, InputsRefused
    for whatever a person has to mend. `wait_seconds`: what the reply's headers ask for.
    """
    status = reply.status
    if 200 <= status < 300:
        return
    said = complaint_of(reply.body)
    found = f"{status}: {said.message}" if said.message else str(status)
    if status == 402 or said.code in _NO_CREDIT:
        raise refuse(
            f"{FIELD}.secretRef", f"{url} wants to be paid ({found})", "top the account up"
        )
    if status in _PASSING or (status >= 500 and status not in (501, 505)):
        everybody = status == 429 or wait_seconds is not None
        kind = "limited" if status == 429 else "failing"
        raise Again(kind, f"the answer {found}", wait_seconds, everybody)
    of_all = status in _ABOUT_REQUEST and not TOO_LONG.search(said.message)
    if status == 403 and _ABOUT[LOGPROBS].search(said.message):
        raise _of_request(replace(said, setting=LOGPROBS), found, url)
    if status in (401, 403) or (of_all and _ABOUT_KEY.search(f"{said.code} {said.message}")):
        raise refuse(
            f"{FIELD}.secretRef", f"{url} refuses the key, or there is none ({found})",
            "name a Secret whose API_KEY may use this model",
        )  # fmt: skip
    no_model = said.code == "model_not_found" or (status == 404 and "model" in said.message.lower())
    if no_model or (of_all and (said.setting == "model" or _ABOUT_MODEL.search(said.message))):
        raise refuse(
            f"{FIELD}.model", f"no {model} at {url} ({found})", "write a name that it serves"
        )
    if status in _ABOUT_REQUEST:
        raise _of_request(said, found, url)
    raise refuse(
        f"{FIELD}.url", f"{url} answers {found}",
        "write the base URL of an OpenAI-compatible server, with its version, such as "
        "http://vllm:8000/v1",
    )  # fmt: skip


def _of_request(said: Complaint, found: str, url: str) -> Exception:
    if not said.setting:
        named = (name for name, words in _ABOUT.items() if words.search(said.message))
        said = replace(said, setting=next(named, ""))
    if said.setting in _SETTINGS and not TOO_LONG.search(said.message):
        field = _SETTINGS[said.setting]
        refusal = refuse(field, f"{url} does not take {said.setting} ({found})", "write another")
        return SettingRefused(refusal, said.setting, said.message)
    return PromptRefused(found)


def same_model(wanted: str, found: str) -> bool:
    """Whether `found` is the model asked for: the same name, or one version of it.

    `gpt-4o` may be answered by `gpt-4o-2024-08-06` and never by `gpt-4o-mini`; a name may be given
    with the organisation before it or without.
    """
    here, there = wanted.lower().removesuffix(":latest"), found.lower().removesuffix(":latest")
    if "/" not in here or "/" not in there:
        here, there = here.rsplit("/", 1)[-1], there.rsplit("/", 1)[-1]
    if here == there:
        return True
    base = here.removesuffix("-latest")
    return there.startswith(base) and _VERSION.fullmatch(there[len(base) :]) is not None


def check_model(content: Mapping[str, Any], model: str, url: str) -> None:
    """InputsRefused when a reply names another model than was asked for."""
    found = content.get("model")
    if isinstance(found, str) and found and not same_model(model, found):
        raise refuse(
            f"{FIELD}.model", f"{url} answers {model} with {found}",
            f"write {found}, if that is the teacher, or mend the server",
        )  # fmt: skip


def tokens_of(content: Mapping[str, Any]) -> tuple[int, int]:
    """(tokens of the prompt, of the answer) as the server counted them; 0 where it does not say, or
    says what cannot be."""
    usage = content.get("usage")
    counts = usage if isinstance(usage, dict) else {}
    return count_of(counts.get("prompt_tokens")), count_of(counts.get("completion_tokens"))


def count_of(found: object) -> int:
    """A number of tokens; 0 for what is none."""
    if not isinstance(found, int) or isinstance(found, bool):
        return 0
    return found if 0 <= found <= _MOST_TOKENS else 0
