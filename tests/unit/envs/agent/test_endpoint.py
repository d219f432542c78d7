"""The endpoint over real HTTP: what it answers, what it refuses, and who may ask."""

import asyncio
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import pytest

from envs.agent.endpoint.server import HttpEndpoint
from envs.agent.messages import Answer, Call, ModelRequest
from envs.agent.runners.runner import Access
from envs.agent.session import RolloutOverError
from trace_async.config import ConfigError

HELLO = {"model": "m", "messages": [{"role": "user", "content": "hello"}]}
ANSWER = Answer(
    number=2,
    content="well",
    reasoning="",
    calls=(),
    is_cut=False,
    prompt_tokens=7,
    completion_tokens=2,
    pieces=(),
    created=1000,
)
WITH_CALL = Answer(
    number=3,
    content="",
    reasoning="hm",
    calls=(Call("lookup", '{"key": "a"}'), Call("stop", "{}")),
    is_cut=False,
    prompt_tokens=7,
    completion_tokens=9,
    pieces=(("lo", -0.5), ("ok", -1.0)),
    created=1000,
)


@dataclass
class Desk:
    """Answers all requests alike and keeps them."""

    answer: Answer = ANSWER
    asked: list[ModelRequest] = field(default_factory=list)
    retries: list[bool] = field(default_factory=list)
    is_over: bool = False

    async def receive(self, request: ModelRequest, *, is_retry: bool) -> Answer:
        if self.is_over:
            raise RolloutOverError
        self.asked.append(request)
        self.retries.append(is_retry)
        return self.answer


@dataclass
class Client:
    access: Access
    desk: Desk
    endpoint: HttpEndpoint

    async def post(self, body: Any, path: str = "chat/completions", **headers: str) -> tuple[int, Any, Any]:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        async with (
            aiohttp.ClientSession() as client,
            client.post(f"{self.access.base_url}/{path}", data=data, headers=headers) as response,
        ):
            text = await response.text()
            is_json = response.headers["content-type"].startswith("application/json")
            return response.status, json.loads(text) if is_json else text, response.headers

    async def refused(self, **changes: Any) -> str:
        status, body, _ = await self.post(HELLO | changes)
        assert status == 400
        return body["error"]["message"]


@pytest.fixture
async def client() -> AsyncIterator[Client]:
    endpoint, desk = HttpEndpoint(), Desk()
    yield Client(await endpoint.open(desk), desk, endpoint)
    await endpoint.shut_down()


async def test_an_answer_has_the_form_of_a_chat_completion(client: Client):
    status, body, _ = await client.post(HELLO)
    assert status == 200
    assert body == {
        "id": "chatcmpl-2",
        "object": "chat.completion",
        "created": 1000,
        "model": "m",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": "well", "refusal": None},
                "logprobs": None,
                "finish_reason": "stop",
            }
        ],
        "usage": {"prompt_tokens": 7, "completion_tokens": 2, "total_tokens": 9},
    }


async def test_tool_calls_reasoning_and_logprobs_have_their_places(client: Client):
    client.desk.answer = WITH_CALL
    _, body, _ = await client.post(HELLO | {"logprobs": True})
    choice = body["choices"][0]
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"]["content"] is None
    assert choice["message"]["reasoning_content"] == "hm"
    assert choice["message"]["tool_calls"] == [
        {"id": "call_3_0", "type": "function", "function": {"name": "lookup", "arguments": '{"key": "a"}'}},
        {"id": "call_3_1", "type": "function", "function": {"name": "stop", "arguments": "{}"}},
    ]
    assert choice["logprobs"]["content"][1] == {"token": "ok", "logprob": -1.0, "bytes": [111, 107], "top_logprobs": []}


async def test_a_stream_says_the_same_in_pieces(client: Client):
    client.desk.answer = WITH_CALL
    _, text, headers = await client.post(HELLO | {"stream": True, "stream_options": {"include_usage": True}})
    assert headers["content-type"].startswith("text/event-stream")
    lines = text.strip().split("\n\n")
    assert lines[-1] == "data: [DONE]"
    events = [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]
    deltas = [event["choices"][0]["delta"] for event in events if event["choices"]]
    assert deltas[0] == {"role": "assistant", "content": None}
    calls = [call for delta in deltas for call in delta.get("tool_calls", [])]
    assert [(call["index"], call["function"]["name"]) for call in calls] == [(0, "lookup"), (1, "stop")]
    assert events[-2]["choices"][0]["finish_reason"] == "tool_calls"
    assert events[-1]["usage"]["total_tokens"] == 16


async def test_a_request_is_read_with_its_limits(client: Client):
    tool = {"type": "function", "function": {"name": "lookup", "parameters": {}}}
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    messages = [{"role": "developer", "content": "be"}, {"role": "user", "content": parts}]
    await client.post({"messages": messages, "tools": [tool], "stop": "x", "max_completion_tokens": 5})
    asked = client.desk.asked[0]
    assert [(message.role, message.content) for message in asked.messages] == [("system", "be"), ("user", "ab")]
    assert asked.tools == (tool,)
    assert (asked.limits.max_new_tokens, asked.limits.stop, asked.may_call) == (5, ("x",), True)
    await client.post(HELLO | {"tools": [tool], "tool_choice": "none", "stop": ["x", "y"], "max_tokens": 6})
    asked = client.desk.asked[1]
    assert (asked.limits.max_new_tokens, asked.limits.stop, asked.may_call) == (6, ("x", "y"), False)


async def test_the_runs_sampling_wins_and_the_answer_says_so(client: Client, caplog):
    body = HELLO | {"temperature": 0.2, "tool_choice": "required"}
    for _ in range(2):
        _, _, headers = await client.post(body)
        assert "temperature=0.2 is not used, the run's own sampling is" in headers["x-trace-async-note"]
        assert 'tool_choice="required": the policy is free' in headers["x-trace-async-note"]
    assert caplog.text.count("temperature=0.2") == 1


async def test_what_cannot_be_done_is_refused_in_words(client: Client):
    image = {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}
    assert await client.refused(n=2) == "n=2: only 1; ask again for another answer"
    assert "not constrained" in await client.refused(response_format={"type": "json_schema", "json_schema": {}})
    assert "log-probability of the sampled token" in await client.refused(top_logprobs=3, logprobs=True)
    assert "a part of type image_url" in await client.refused(messages=[image])
    assert "end with a user or tool message" in await client.refused(messages=[{"role": "assistant", "content": "x"}])
    assert await client.refused(messages=[]) == "messages: there are none"
    assert "messages.0.role" in await client.refused(messages=[{"role": "king", "content": "x"}])
    assert await client.refused(max_tokens=0) == "max_tokens=0: must be ≥ 1"
    assert "at most 4" in await client.refused(stop=["a", "b", "c", "d", "e"])
    assert "logit_bias" in await client.refused(logit_bias={"1": 2})
    for body, words in ((b"{", "not JSON"), (b"[1]", "not a JSON object"), (b"[" * 100_000, "not JSON")):
        status, answer, _ = await client.post(body)
        assert status == 400
        assert words in answer["error"]["message"]
    assert client.desk.asked == []


async def test_only_the_secret_path_is_answered_and_only_while_its_rollout_lives(client: Client):
    other = await client.endpoint.open(Desk())
    assert other.base_url != client.access.base_url
    base, _, _ = client.access.base_url.rpartition("/v1")
    for path in (f"{base}x/v1", base.rpartition("/")[0] + "/v1", base.rpartition("/")[0] + "//v1"):
        wrong = Client(Access(base_url=path, api_key=""), client.desk, client.endpoint)
        assert (await wrong.post(HELLO))[0] == 404
    assert (await client.post(HELLO, "embeddings"))[0] == 404
    client.endpoint.close(client.access)
    assert (await client.post(HELLO))[0] == 404
    assert client.desk.asked == []


async def test_models_are_listed_under_the_secret_path_alone(client: Client):
    async with aiohttp.ClientSession() as http:
        async with http.get(f"{client.access.base_url}/models") as response:
            assert [model["id"] for model in (await response.json())["data"]] == ["policy"]
        async with http.get(client.access.base_url.replace("/v1", "x/v1/models")) as response:
            assert response.status == 404


async def test_a_client_that_asks_again_says_so(client: Client):
    await client.post(HELLO, **{"x-stainless-retry-count": "0"})
    await client.post(HELLO, **{"x-stainless-retry-count": "1"})
    assert client.desk.retries == [False, True]


async def test_a_rollout_that_is_over_is_a_404_that_clients_do_not_repeat(client: Client):
    client.desk.is_over = True
    status, body, _ = await client.post(HELLO)
    assert (status, body["error"]["message"]) == (404, "this rollout has ended")


async def test_beyond_loopback_the_key_is_asked_for_as_well():
    with pytest.raises(ConfigError, match=r"env\.args\.advertise"):
        HttpEndpoint("0.0.0.0")
    endpoint, desk = HttpEndpoint("0.0.0.0", "127.0.0.1"), Desk()
    client = Client(await endpoint.open(desk), desk, endpoint)
    assert (await client.post(HELLO))[0] == 404
    assert (await client.post(HELLO, authorization="Bearer sk-wrong"))[0] == 404
    assert (await client.post(HELLO, authorization=f"Bearer {client.access.api_key}"))[0] == 200
    assert (await client.post(HELLO, **{"x-api-key": client.access.api_key}))[0] == 200
    await endpoint.shut_down()


async def test_an_endpoint_whose_loop_has_ended_starts_anew_in_the_next():
    endpoint = HttpEndpoint()

    async def once() -> int:
        desk = Desk()
        return (await Client(await endpoint.open(desk), desk, endpoint).post(HELLO))[0]

    statuses = [await asyncio.to_thread(asyncio.run, once()) for _ in range(2)]
    assert statuses == [200, 200]
