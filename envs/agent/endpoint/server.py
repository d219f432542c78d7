"""The endpoint that agents talk to: one HTTP server a process, one secret path a rollout.

The server is aiohttp's, which reads HTTP in C and runs in the loop that the rollouts live in. A path is known only to
the agent that it was made for and is gone when its rollout ends; the server listens on loopback unless told otherwise,
and beyond loopback it asks for the rollout's key as well.
"""

import asyncio
import hmac
import ipaddress
import json
import logging
import secrets
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web

from envs.agent.endpoint.anthropic import read_anthropic, stream_anthropic, write_anthropic
from envs.agent.endpoint.chat import read_chat, stream_chat, write_chat
from envs.agent.endpoint.responses import read_responses, stream_responses, write_responses
from envs.agent.messages import Answer, ModelRequest, RequestError
from envs.agent.runners.runner import Access
from envs.agent.session import Receiver, RolloutOverError
from trace_async.config import ConfigError
from trace_async.env import EnvError

log = logging.getLogger(__name__)

_MAX_BODY_BYTES = 64 * 1024**2
_IDLE_CONNECTION_S = 3600.0  # tools take their time; a connection closed under a client is an error to some of them
MODEL_NAME = "policy"

Read = Callable[[Mapping[str, Any]], tuple[ModelRequest, list[str]]]
Write = Callable[[Answer, Mapping[str, Any]], "dict[str, Any] | Iterable[str]"]


@dataclass(frozen=True, slots=True)
class Protocol:
    """One way to ask: reads a body, and writes an answer as JSON or as lines of a stream."""

    read: Read
    write: Write


def _write_chat(answer: Answer, body: Mapping[str, Any]) -> "dict[str, Any] | Iterable[str]":
    model = str(body.get("model") or MODEL_NAME)
    if body.get("stream"):
        options = body.get("stream_options") or {}
        return stream_chat(answer, model, include_usage=bool(options.get("include_usage")))
    return write_chat(answer, model)


def _write_responses(answer: Answer, body: Mapping[str, Any]) -> "dict[str, Any] | Iterable[str]":
    write = stream_responses if body.get("stream") else write_responses
    return write(answer, str(body.get("model") or MODEL_NAME), body)


def _write_anthropic(answer: Answer, body: Mapping[str, Any]) -> "dict[str, Any] | Iterable[str]":
    write = stream_anthropic if body.get("stream") else write_anthropic
    return write(answer, str(body.get("model") or MODEL_NAME))


PROTOCOLS = {
    "chat/completions": Protocol(read_chat, _write_chat),
    "responses": Protocol(read_responses, _write_responses),
    "messages": Protocol(read_anthropic, _write_anthropic),
}


@dataclass(slots=True, eq=False)
class HttpEndpoint:
    """The HTTP server of a process. It starts when the first path is opened, in the loop that opens it."""

    host: str = "127.0.0.1"
    """Where it listens. Anything but loopback needs `advertise`."""
    advertise: str = ""
    """The name by which agents reach it; empty: `host`."""
    _receivers: dict[str, tuple[Receiver, str]] = field(default_factory=dict)
    """Secret of a path → who answers there, and the key of the rollout."""
    _runner: web.AppRunner | None = None
    _loop: asyncio.AbstractEventLoop | None = None
    _starting: asyncio.Lock | None = None
    _port: int = 0
    _noted: set[str] = field(default_factory=set)
    """Notes that are in the log already."""

    def __post_init__(self) -> None:
        if not self.is_loopback and not self.advertise:
            raise ConfigError(
                f"env.args.host={self.host}: beyond loopback also name env.args.advertise, the host by which agents "
                "reach this machine; every request must then carry the key of its rollout"
            )

    @property
    def is_loopback(self) -> bool:
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"

    async def open(self, receiver: Receiver) -> Access:
        """Open a new secret path to `receiver`. Raises EnvError when the server cannot listen."""
        await self._ensure_started()
        secret, key = secrets.token_urlsafe(24), f"sk-{secrets.token_urlsafe(24)}"
        self._receivers[secret] = (receiver, key)
        host = self.advertise or self.host
        return Access(base_url=f"http://{f'[{host}]' if ':' in host else host}:{self._port}/{secret}/v1", api_key=key)

    def close(self, access: Access) -> None:
        """Forget the path: whoever asks there from now on is told that the rollout has ended."""
        self._receivers.pop(access.base_url.rsplit("/", 2)[1], None)  # …/SECRET/v1

    async def _ensure_started(self) -> None:
        loop = asyncio.get_running_loop()
        if self._loop is not loop:  # the first, or one of an earlier asyncio.run, whose server ended with it
            self._loop, self._runner, self._starting = loop, None, asyncio.Lock()
        assert self._starting is not None
        async with self._starting:
            if self._runner is not None:
                return
            app = web.Application(client_max_size=_MAX_BODY_BYTES)
            app.router.add_post("/{secret}/v1/{protocol:.+}", self._answer)
            app.router.add_get("/{secret}/v1/models", self._models)
            runner = web.AppRunner(app, access_log=None, keepalive_timeout=_IDLE_CONNECTION_S, shutdown_timeout=1)
            await runner.setup()
            site = web.TCPSite(runner, self.host, 0, backlog=4096)
            try:
                await site.start()
            except OSError as error:
                await runner.cleanup()
                raise EnvError(f"the agents' endpoint cannot listen on env.args.host={self.host}: {error}") from error
            self._runner, self._port = runner, runner.addresses[0][1]

    async def shut_down(self) -> None:
        """Stop the server. One that another loop started has ended with that loop."""
        if self._runner is not None and self._loop is asyncio.get_running_loop():
            await self._runner.cleanup()
        self._runner, self._loop = None, None

    def _receiver(self, request: web.Request) -> Receiver | None:
        found = self._receivers.get(request.match_info["secret"])
        if found is None:
            return None
        receiver, key = found
        given = request.headers.get("x-api-key") or request.headers.get("authorization", "").removeprefix("Bearer ")
        if not self.is_loopback and not hmac.compare_digest(given.encode(), key.encode()):
            return None
        return receiver

    async def _models(self, request: web.Request) -> web.Response:
        if self._receiver(request) is None:
            return _error(404, "this rollout has ended, or never was")
        model = {"id": MODEL_NAME, "object": "model", "created": 0, "owned_by": "trace_async"}
        return web.json_response({"object": "list", "data": [model]})

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        receiver = self._receiver(request)
        if receiver is None:
            return _error(404, "this rollout has ended, or never was")
        protocol = PROTOCOLS.get(request.match_info["protocol"])
        if protocol is None:
            return _error(404, f"/v1/{request.match_info['protocol']}: there are {', '.join(PROTOCOLS)}, models")
        try:
            body = json.loads(await request.read())
            if not isinstance(body, dict):
                raise RequestError("the body is not a JSON object")
            asked, notes = protocol.read(body)
        except RequestError as error:
            return _error(400, str(error))
        except (ValueError, RecursionError) as error:
            return _error(400, f"the body is not JSON: {error}")
        try:
            # The clients of OpenAI and Anthropic count their tries in this header.
            answer = await receiver.receive(asked, is_retry=request.headers.get("x-stainless-retry-count", "0") != "0")
        except RolloutOverError:
            return _error(404, "this rollout has ended")
        return await self._write(request, protocol.write(answer, body), self._told(notes))

    def _told(self, notes: Iterable[str]) -> dict[str, str]:
        """Return a header that says what was not done as asked, and log each note once."""
        for note in set(notes) - self._noted:
            self._noted.add(note)
            log.warning("agent endpoint: %s", note)
        text = "; ".join(notes).encode("ascii", "replace").decode()
        return {"x-trace-async-note": "".join(c for c in text if c.isprintable())} if text else {}

    async def _write(
        self, request: web.Request, written: "dict[str, Any] | Iterable[str]", headers: Mapping[str, str]
    ) -> web.StreamResponse:
        if isinstance(written, dict):
            return web.json_response(written, headers=headers)
        response = web.StreamResponse(headers={**headers, "content-type": "text/event-stream"})
        try:
            await response.prepare(request)
            await response.write("".join(written).encode())
            await response.write_eof()
        except ConnectionResetError:
            log.debug("an agent went away in the middle of an answer")
        return response


def _error(status: int, text: str) -> web.Response:
    body = {"error": {"message": text, "type": "invalid_request_error", "param": None, "code": None}}
    return web.json_response(body, status=status)
