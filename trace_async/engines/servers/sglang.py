"""Use SGLang 0.5.23 as an engine; it is the default on GPUs. Recipe and traps are in docs/engines.md."""

import asyncio
import json
import os
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from trace_async.engine import EngineError
from trace_async.engines.servers.environments import engine_python
from trace_async.engines.servers.http_client import Reply
from trace_async.engines.servers.http_engine import HttpEngine, version_spans
from trace_async.engines.servers.server import command_line_flags
from trace_async.engines.servers.weight_record import Tensors
from trace_async.types import Completion, FinishReason, SamplingParams

MIN_SHARED_TOKENS = 32
CPU_STAND_INS = Path(__file__).parents[1] / "cpu_stand_ins"


@dataclass(slots=True)
class _Siblings:
    """The requests in flight for one prompt."""

    num_in_flight: int = 0
    warm_up: asyncio.Task[None] | None = None
    """The request that fills the cache for all but the first."""


class SGLangEngine(HttpEngine):
    """Runs SGLang's server with its radix cache on; see HttpEngine for limits and weight updates.

    The policy version is the namespace of a request's cache, so KV of other weights is never used.
    """

    name = "sglang"

    def _forget(self) -> None:
        super()._forget()
        self._siblings: dict[tuple[int, ...], _Siblings] = {}

    def _command(self, port: int, scratch: Path) -> tuple[list[str], dict[str, str]]:
        config = self._config
        arguments: dict[str, object] = {
            "model_path": _without_end_tokens(self._policy_path, scratch / "model"),
            "host": "127.0.0.1",
            "port": port,
            "dtype": config.dtype,
            "tp_size": config.tensor_parallel_size,
            "max_running_requests": config.max_running_requests,
            "max_total_tokens": config.kv_cache_tokens or None,
            # SGLang keeps a few tokens of the context to itself.
            "context_length": self._max_context_tokens + 8,
            "random_seed": self._seed,
            "disable_radix_cache": not config.prefix_cache,
            # "lpm", longest prefix first, holds siblings on a cold prompt back until the first has filled the cache.
            "schedule_policy": "lpm",
            "grammar_backend": "none",
            "weight_version": "0",
            "skip_server_warmup": True,
        }
        environment = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONPATH": ""}
        environment["OMP_NUM_THREADS"] = str(config.num_threads)
        if not self._on_gpu:
            arguments |= {
                "device": "cpu",
                "attention_backend": "torch_native",
                "disable_overlap_schedule": True,
                "mem_fraction_static": 0.1,
                # The scheduler would otherwise spin on a core of its own.
                "sleep_on_idle": True,
            }
            environment |= {"SGLANG_USE_CPU_ENGINE": "1", "PYTHONPATH": str(CPU_STAND_INS)}
            if config.tensor_parallel_size > 1:
                # Without this it wants a NUMA node for each worker.
                environment["SGLANG_CPU_OMP_THREADS_BIND"] = _shared_out_cores(config.tensor_parallel_size)
        arguments |= config.server_args
        python = engine_python(self.name, config.python)
        return [python, "-m", "sglang.launch_server", *command_line_flags(arguments)], environment

    def _generate_request(self, request_id: str, prompt: Sequence[int], params: SamplingParams) -> tuple[str, Reply]:
        sampling: dict[str, object] = {
            "temperature": params.temperature,
            "top_p": params.top_p,
            "top_k": params.top_k or -1,
            "max_new_tokens": params.max_new_tokens,
            "stop_token_ids": list(params.stop_token_ids),
            "stop": list(params.stop),
            "no_stop_trim": True,
        }
        return "/generate", {
            "rid": request_id,
            "input_ids": list(prompt),
            "sampling_params": sampling,
            "return_logprob": True,
            "extra_key": f"policy_version={self.policy_version}",
        }

    def _completion(self, reply: Reply) -> Completion:
        meta = reply["meta_info"]
        finish = meta["finish_reason"]
        if finish["type"] == "abort":
            raise EngineError(f"{self._describe()} aborted a request: {finish.get('message')}")
        reason: FinishReason = "stop" if finish["type"] == "stop" else "length"
        return Completion(
            token_ids=tuple(reply["output_ids"]),
            logprobs=tuple(float(entry[0]) for entry in meta["output_token_logprobs"]),
            version_spans=version_spans(meta["weight_versions"]),
            finish_reason=reason,
            prompt_tokens=meta["prompt_tokens"],
            cached_tokens=meta["cached_tokens"],
        )

    async def _sample(self, prompt: Sequence[int], params: SamplingParams) -> Completion:
        """Let siblings that arrive while the first request for their prompt is in flight wait until its KV is there.

        SGLang would compute equal cold prompts of one batch once for each of them. So the second one to come sends a
        request that only fills the cache, and all but the first go on when that has ended.
        """
        if len(prompt) < MIN_SHARED_TOKENS or not self._config.prefix_cache:
            return await super()._sample(prompt, params)
        siblings = self._siblings.setdefault(tuple(prompt), _Siblings())
        siblings.num_in_flight += 1
        try:
            if siblings.num_in_flight > 1:
                if siblings.warm_up is None:
                    siblings.warm_up = asyncio.create_task(self._fill_cache(prompt))
                await asyncio.shield(siblings.warm_up)  # one sibling that is cancelled must not cancel it for all
            return await super()._sample(prompt, params)
        finally:
            siblings.num_in_flight -= 1
            if not siblings.num_in_flight:
                del self._siblings[tuple(prompt)]

    async def _fill_cache(self, prompt: Sequence[int]) -> None:
        _, body = self._generate_request(uuid.uuid4().hex, prompt, SamplingParams())
        body["sampling_params"]["max_new_tokens"] = 0
        await self._within_limit(self._client().post("/generate", body, limit_s=None))

    async def _abort(self, request_id: str) -> None:
        await self._post("/abort_request", {"rid": request_id})

    async def _ping(self) -> None:
        # This asks the scheduler for its state, so it fails when the scheduler hangs. It also answers while paused.
        await self._get("/server_info")

    async def _hold(self) -> None:
        await self._post("/pause_generation", {"mode": "retract"})

    async def _release(self) -> None:
        await self._post("/continue_generation")

    async def _set_version(self, policy_version: int) -> None:
        await self._post("/update_weight_version", {"new_version": str(policy_version), "abort_all_requests": False})

    async def _load_from_folder(self, folder: Path, tensors: Tensors) -> None:
        await self._post("/update_weights_from_disk", {"model_path": str(folder), "flush_cache": False})

    async def _load_by_broadcast(self, tensors: Tensors) -> None:
        await self._post("/begin_weight_update")
        await self._broadcast.send(tensors, join=self._join_broadcast, receive=self._receive_broadcast)
        await self._post("/end_weight_update")

    async def _join_broadcast(self, group: dict[str, Reply]) -> Reply:
        told = {
            "master_address": "127.0.0.1",
            "master_port": group["port"],
            "rank_offset": 1,
            "world_size": group["world_size"],
            "group_name": group["name"],
            "backend": group["backend"],
        }
        return await self._post("/init_weights_update_group", told)

    async def _receive_broadcast(self, told: dict[str, Reply]) -> Reply:
        return await self._post("/update_weights_from_distributed", told | {"flush_cache": False})

    async def _flush_cache(self) -> None:
        await self._post("/flush_cache")

    async def _digests(self) -> dict[str, str]:
        reply = await self._post("/weights_checker", {"action": "checksum"})
        return {
            f"rank{i}:{name}" if i else name: digest
            for i, rank in enumerate(reply["ranks"])
            for name, digest in rank["checksums"].items()
        }


def _shared_out_cores(num_workers: int) -> str:
    """Share the cores out to the workers, in SGLang's form `0,2|1,3`. Workers share cores if there are too few."""
    cores = sorted(os.sched_getaffinity(0))
    own = (cores[worker::num_workers] or cores for worker in range(num_workers))
    return "|".join(",".join(map(str, some)) for some in own)


def _without_end_tokens(policy_path: Path, folder: Path) -> Path:
    """Copy the model directory by links, without the entries that name a token that ends an answer.

    SGLang ends an answer at the end tokens of the model's and the tokenizer's files, or with `ignore_eos` at no token
    at all. With this copy only the request's `stop_token_ids` end it, as with the other engines.
    """
    folder.mkdir()
    for file in policy_path.iterdir():
        if file.name in ("config.json", "generation_config.json", "tokenizer_config.json"):
            content = json.loads(file.read_text())
            content.pop("eos_token_id", None)
            if file.name == "tokenizer_config.json":
                content["eos_token"] = None
            (folder / file.name).write_text(json.dumps(content))
        else:
            (folder / file.name).symlink_to(file)
    return folder
