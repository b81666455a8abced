"""A real server of OpenAI's API before a real tiny model, which misbehaves by script.

    with serving(Mind.tiny()) as server:
        server.faults += [Fault(429, headers={"Retry-After": "1"}), None, Fault("reset")]

Each POST takes the next fault (None: it is answered); an empty list is a calm server. `server.seen`
is the server's own record, with its own clock.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import data_kit
import endpoint_speech
import torch
from aiohttp import web
from jinja2 import Environment
from kubedistill_trainer.data.tokenizer import TextTokenizer
from kubedistill_trainer.models.generation import generate
from transformers import AutoConfig, AutoModelForCausalLM

Trouble = Literal[
    "reset",
    "half",
    "not-json",
    "no-choices",
    "no-message",
    "list",
    "drip",
    "hang",
    "late",
    "other-model",
    "other-body",
    "pieces",
]


@dataclass(frozen=True)
class Fault:
    """What a request gets in place of its answer: a status, or trouble with the answer.

    `drip`: the answer's bytes, one each `pause` seconds; `hang`: nothing for `pause` seconds; `late`:
    the right answer after them; `other-body`: `body`, paid for, in the answer's place; `pieces`: the
    bytes of `body` in its place, one part each `pause` seconds, as server-sent events.
    `where`: None, or a text that the request's body must hold; the fault waits for such a request.
    """

    what: int | Trouble
    headers: dict[str, str] = field(default_factory=dict)
    body: Any = None
    pause: float = 0.05
    where: str | None = None


@dataclass
class Seen:
    """A POST as the server saw it. `paid`: it got the whole answer that it asked for."""

    path: str
    body: dict[str, Any]
    key: str
    came: float
    fault: int | str | None = None
    left: float = 0.0
    """When its answer, or what it got for one, began to go."""
    paid: bool = False
    port: int = 0
    """Of its asker: one a connection."""


@dataclass(frozen=True)
class Mind:
    """A causal model with its tokenizer and the way in which it reads conversations."""

    model: Any
    tokenizer: TextTokenizer
    template: str = data_kit.TURNS
    context: int = 512

    @classmethod
    def tiny(cls, seed: int = 0, tokenizer: TextTokenizer | None = None) -> Mind:
        """Random weights; says what nobody taught it, and always the same."""
        tokenizer = tokenizer or data_kit.tokenizer()
        torch.manual_seed(seed)
        config = AutoConfig.for_model(
            "llama", vocab_size=tokenizer.vocab_size, hidden_size=32, intermediate_size=48,
            num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            max_position_embeddings=512, eos_token_id=tokenizer.end_of_text,
            # Enough that the likeliest token stands out in spite of the order of additions.
            initializer_range=0.2,
        )  # fmt: skip
        return cls(AutoModelForCausalLM.from_config(config).eval(), tokenizer)

    def ids(self, text: str) -> list[int]:
        found: list[int] = self.tokenizer.tokenizer.encode(text, add_special_tokens=False).ids
        return found

    def text(self, ids: Sequence[int]) -> str:
        said: str = self.tokenizer.tokenizer.decode(list(ids), skip_special_tokens=False)
        return said

    def prompt(self, messages: list[dict[str, str]]) -> list[int]:
        template = Environment().from_string(self.template)  # noqa: S701 - no HTML
        return self.ids(template.render(messages=messages, add_generation_prompt=True))

    def says(self, prompt: list[int], body: dict[str, Any]) -> tuple[list[int], bool]:
        """(answer, whether it ended by itself)."""
        limit = int(body.get("max_completion_tokens") or body.get("max_tokens") or 16)
        [answer] = generate(
            self.model, [prompt], max_tokens=limit, end_ids=[self.tokenizer.end_of_text],
            temperature=float(body.get("temperature", 1.0)), top_p=float(body.get("top_p", 1.0)),
            seed=int(body.get("seed") or 0),
        )  # fmt: skip
        return answer, len(answer) < limit

    @torch.no_grad()
    def log_probs(self, ids: list[int]) -> torch.Tensor:
        """[L, V] after each token, at temperature 1."""
        return torch.log_softmax(self.model(torch.tensor([ids])).logits[0].float(), -1)


class Server:
    """The handlers and their record. Settings may change while it runs."""

    def __init__(self, mind: Mind, name: str = "tiny") -> None:
        self.mind = mind
        self.name = name
        self.url = ""
        self.key: str | None = None
        """The only key that it takes; None takes all."""
        self.lists_models = True
        self.says_context: int | None = None
        """`max_model_len` in the list of models, as vLLM's."""
        self.other_models: list[str] = []
        self.answers_as: str | None = None
        self.reasons = ""
        """Said apart before every answer, as `reasoning_content`."""
        self.max_logprobs = 400
        self.knows_prompt_logprobs = True
        self.knows_token_ids = True
        self.tokenizes = True
        self.only_max_completion_tokens = False
        self.knows_seed = True
        self.logprobs: Literal["told", "kept", "refused"] = "told"
        """What it does with `logprobs` of answers: tells them, says nothing, or answers 403."""
        self.templates = True
        """Whether its model has a chat template; a base model has none."""
        self.streams = True
        self.limit: tuple[int, float] | None = None
        """(requests, seconds): more than that in that time are refused with `Retry-After`."""
        self.faults: list[Fault | None] = []
        self.seen: list[Seen] = []
        self.open = self.open_most = 0
        self._turn = threading.Lock()

    @property
    def paid(self) -> list[Seen]:
        """The requests that got what they asked for."""
        return [seen for seen in self.seen if seen.paid]

    def app(self) -> web.Application:
        app = web.Application(client_max_size=1 << 26)
        app.router.add_get("/v1/models", self._models)
        app.router.add_post("/v1/chat/completions", self._post)
        app.router.add_post("/v1/completions", self._post)
        app.router.add_post("/tokenize", self._tokenize)
        return app

    async def _models(self, request: web.Request) -> web.Response:
        if not self._knows(request):
            return _error(401, "Incorrect API key provided: " + _key(request), "invalid_api_key")
        if not self.lists_models:
            return _error(404, "Not Found")
        names = [self.name, *self.other_models]
        more = {} if self.says_context is None else {"max_model_len": self.says_context}
        models = [{"id": name, **more} for name in names]
        return web.json_response({"object": "list", "data": models})

    async def _tokenize(self, request: web.Request) -> web.Response:
        if not self.tokenizes:
            return _error(404, "Not Found")
        body = await request.json()
        return web.json_response({"tokens": self.mind.ids(body["prompt"])})

    async def _post(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        seen = Seen(request.path, body, _key(request), time.monotonic())
        if request.transport is not None:
            seen.port = request.transport.get_extra_info("peername")[1]
        self.seen.append(seen)
        self.open += 1
        self.open_most = max(self.open_most, self.open)
        try:
            return await self._answer(request, seen)
        finally:
            seen.left = time.monotonic()
            self.open -= 1

    async def _answer(self, request: web.Request, seen: Seen) -> web.StreamResponse:
        fault = self._next_fault(seen)
        seen.fault = fault.what if fault else None
        if fault is not None and isinstance(fault.what, int):
            return web.json_response(
                fault.body or {"error": {"message": f"scripted {fault.what}"}},
                status=fault.what, headers=fault.headers,
            )  # fmt: skip
        refused = self._refusal(request, seen)
        if refused is not None:
            return refused
        work = self._chat if request.path.endswith("chat/completions") else self._complete
        content = await asyncio.to_thread(self._in_turn, work, seen.body)
        if isinstance(content, web.Response):
            return content
        if fault is not None and fault.what == "late":
            await asyncio.sleep(fault.pause)
        elif fault is not None and fault.what == "other-body":
            content = fault.body
        elif fault is not None:
            return await self._spoilt(request, content, fault)
        seen.paid = True
        if seen.body.get("stream") and self.streams:
            return await endpoint_speech.streamed(request, content, self.mind)
        return web.json_response(content, headers=fault.headers if fault else None)

    def _in_turn(self, work: Any, body: dict[str, Any]) -> Any:
        with self._turn:
            return work(body)

    def _next_fault(self, seen: Seen) -> Fault | None:
        text = json.dumps(seen.body)
        for place, fault in enumerate(self.faults):
            if fault is None or fault.where is None or fault.where in text:
                return self.faults.pop(place)
        return None

    def _knows(self, request: web.Request) -> bool:
        return self.key is None or _key(request) == self.key

    def _refusal(self, request: web.Request, seen: Seen) -> web.Response | None:
        if not self._knows(request):
            return _error(401, "Incorrect API key provided: " + _key(request), "invalid_api_key")
        if seen.body.get("model") not in (self.name, *self.other_models):
            said = f"The model `{seen.body.get('model')}` does not exist."
            return _error(404, said, "model_not_found")
        if self.only_max_completion_tokens and "max_tokens" in seen.body:
            return _error(
                400, "Unsupported parameter: 'max_tokens' is not supported with this model. Use "
                "'max_completion_tokens' instead.", "unsupported_parameter", "max_tokens",
            )  # fmt: skip
        if not self.knows_seed and "seed" in seen.body:
            wrong = {"type": "extra_forbidden", "loc": ["body", "seed"], "msg": "Not permitted"}
            return web.json_response({"detail": [wrong]}, status=422)
        if self.logprobs == "refused" and seen.body.get("logprobs"):
            return _error(403, "You are not allowed to request logprobs from this model")
        if self.limit is not None:
            count, seconds = self.limit
            recent = [s for s in self.seen if s.paid and s.came > seen.came - seconds]
            if len(recent) >= count:
                wait = recent[-count].came + seconds - seen.came
                response = _error(429, "Rate limit reached", "rate_limit_exceeded")
                response.headers["Retry-After"] = f"{wait:.3f}"
                seen.fault = 429
                return response
            # Here and not when it is answered: others come meanwhile.
            seen.paid = True
        return None

    def _chat(self, body: dict[str, Any]) -> dict[str, Any] | web.Response:
        if not self.templates:
            return _error(400, "default chat template is no longer allowed", "BadRequestError")
        prompt = self.mind.prompt(body["messages"])
        limit = int(body.get("max_completion_tokens") or body.get("max_tokens") or 16)
        if len(prompt) + limit > self.mind.context:
            return _error(
                400, f"This model's maximum context length is {self.mind.context} tokens, and you "
                f"asked for {len(prompt) + limit}.", "context_length_exceeded", "messages",
            )  # fmt: skip
        answer, ended = self.mind.says(prompt, body)
        message: dict[str, Any] = {"role": "assistant", "content": self.mind.text(answer)}
        if self.reasons:
            message["reasoning_content"] = self.reasons
        choice = {"index": 0, "message": message, "finish_reason": "stop" if ended else "length"}
        if body.get("logprobs") and self.logprobs == "told":
            choice["logprobs"] = {"content": endpoint_speech.weighed(self.mind, prompt, answer)}
        return self._content("chat.completion", choice, len(prompt), len(answer))

    def _complete(self, body: dict[str, Any]) -> dict[str, Any] | web.Response:
        prompt = body["prompt"]
        ids = self.mind.ids(prompt) if isinstance(prompt, str) else list(prompt)
        width = body.get("prompt_logprobs") if self.knows_prompt_logprobs else None
        echoed = body.get("logprobs") if body.get("echo") else None
        if max(width or 0, echoed or 0) > self.max_logprobs:
            return _error(
                400, f"Requested prompt logprobs of {width or echoed}, which is greater than max "
                f"allowed: {self.max_logprobs}", "BadRequestError", "prompt_logprobs",
            )  # fmt: skip
        if len(ids) + int(body.get("max_tokens", 16)) > self.mind.context:
            return _error(400, f"maximum context length is {self.mind.context}", "BadRequestError")
        choice: dict[str, Any] = {"index": 0, "text": "", "finish_reason": "length"}
        if isinstance(prompt, str) and width is None and echoed is None:
            answer, ended = self.mind.says(ids, body)
            tells = bool(body.get("logprobs")) and self.logprobs == "told"
            choice = endpoint_speech.continued(
                self.mind, ids, answer, ended, body.get("stop"), tells
            )
            return self._content("text_completion", choice, len(ids), len(answer))
        if width is not None:
            choice["prompt_logprobs"] = self._scores(ids, width)
        if echoed is not None:
            by_ids = self.knows_token_ids and body.get("return_tokens_as_token_ids")
            choice["logprobs"] = self._echo(ids, echoed, bool(by_ids))
        return self._content("text_completion", choice, len(ids), 1)

    def _scores(self, ids: list[int], width: int) -> list[dict[str, Any] | None]:
        """As vLLM: nothing of the first token; of each other the likeliest, and itself."""
        rows: list[dict[str, Any] | None] = [None]
        for row, token in zip(self.mind.log_probs(ids)[:-1], ids[1:], strict=True):
            kept = dict.fromkeys([token, *row.topk(width).indices.tolist()])
            rows.append(
                {str(t): {"logprob": float(row[t]), "rank": int((row > row[t]).sum()) + 1,
                          "decoded_token": self.mind.text([t])} for t in kept}
            )  # fmt: skip
        return rows

    def _echo(self, ids: list[int], width: int, by_ids: bool) -> dict[str, Any]:
        def shown(token: int) -> str:
            return f"token_id:{token}" if by_ids else self.mind.text([token])

        top: list[dict[str, float] | None] = [
            row and {shown(int(t)): entry["logprob"] for t, entry in row.items()}
            for row in self._scores(ids, width)
        ]
        return {"tokens": [shown(t) for t in ids], "top_logprobs": [*top, {}]}

    def _content(
        self, kind: str, choice: dict[str, Any], prompt: int, answer: int
    ) -> dict[str, Any]:
        usage = {"prompt_tokens": prompt, "completion_tokens": answer}
        return {
            "object": kind, "model": self.answers_as or self.name, "choices": [choice],
            "usage": usage,
        }  # fmt: skip

    async def _spoilt(
        self, request: web.Request, content: dict[str, Any], fault: Fault
    ) -> web.StreamResponse:
        if fault.what == "pieces":
            return await endpoint_speech.sent(request, fault.body, fault.pause)
        whole = json.dumps(content).encode()
        transport = request.transport
        assert transport is not None
        match fault.what:
            case "no-choices":
                return web.json_response({**content, "choices": []})
            case "no-message":
                return web.json_response({**content, "choices": [{"index": 0}]})
            case "list":
                return web.json_response([content])
            case "other-model":
                return web.json_response({**content, "model": "somebody-else"})
            case "not-json":
                return web.Response(body=b"<html>busy</html>", content_type="text/html")
            case "hang":
                await asyncio.sleep(fault.pause)
                return web.json_response({})
        response = web.StreamResponse(headers={"Content-Type": "application/json"})
        response.content_length = len(whole)
        if fault.what != "reset":
            await response.prepare(request)
        if fault.what == "drip":
            for place in range(len(whole)):
                await response.write(whole[place : place + 1])
                await asyncio.sleep(fault.pause)
        elif fault.what == "half":
            await response.write(whole[: len(whole) // 2])
        transport.close() if fault.what == "half" else transport.abort()
        return response


def _key(request: web.Request) -> str:
    return request.headers.get("Authorization", "").removeprefix("Bearer ")


def _error(status: int, said: str, code: str = "", setting: str | None = None) -> web.Response:
    error = {"message": said, "type": "invalid_request_error", "code": code, "param": setting}
    return web.json_response({"error": error}, status=status)


@contextlib.contextmanager
def serving(mind: Mind, name: str = "tiny") -> Iterator[Server]:
    """The server on a free port of 127.0.0.1, in a thread of its own."""
    server = Server(mind, name)
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="endpoint-server", daemon=True)
    thread.start()

    async def start() -> web.AppRunner:
        # As real servers do: an answer that nobody waits for is given up.
        runner = web.AppRunner(server.app(), handler_cancellation=True, shutdown_timeout=0.1)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        server.url = f"http://127.0.0.1:{runner.addresses[0][1]}/v1"
        return runner

    runner = asyncio.run_coroutine_threadsafe(start(), loop).result()
    try:
        yield server
    finally:
        asyncio.run_coroutine_threadsafe(runner.cleanup(), loop).result()
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()
