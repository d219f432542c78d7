"""SGLang 0.5.23 as an engine: the default on GPUs. Recipe and traps: docs/engines.md."""

from collections.abc import Sequence
from pathlib import Path

from trace_async.engine import EngineError
from trace_async.engines.http_client import Reply
from trace_async.engines.http_engine import HttpEngine, version_spans
from trace_async.engines.server import command_line_flags, engine_python
from trace_async.types import Completion, FinishReason, SamplingParams

CPU_STAND_INS = Path(__file__).with_name("cpu_stand_ins")


class SGLangEngine(HttpEngine):
    """SGLang's server with its radix cache on; see HttpEngine for limits and weight updates.

    Every request's cache namespace is its policy version. `SamplingParams.seed` is not used: SGLang samples per
    request from one stream unless it runs in its deterministic mode.
    """

    name = "sglang"

    def _command(self, port: int) -> tuple[list[str], dict[str, str]]:
        config = self._config
        arguments: dict[str, object] = {
            "model_path": self._policy_path,
            "host": "127.0.0.1",
            "port": port,
            "dtype": config.dtype,
            "tp_size": config.tensor_parallel_size,
            "max_running_requests": config.max_running_requests,
            "max_total_tokens": config.kv_cache_tokens or None,
            "context_length": self._max_context_tokens,
            "random_seed": self._seed,
            "disable_radix_cache": not config.prefix_cache,
            # Longest prefix first holds siblings on one cold prompt back until the first of them has filled the cache.
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
        arguments |= config.server_args
        python = engine_python(self.name, config.python)
        return [python, "-m", "sglang.launch_server", *command_line_flags(arguments)], environment

    def _generate_request(
        self, request_id: str, prompt: Sequence[int], params: SamplingParams, sample: int
    ) -> tuple[str, Reply]:
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
            "extra_key": f"policy_version={self._policy_version}",
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

    async def _abort(self, request_id: str) -> None:
        await self._post("/abort_request", {"rid": request_id})

    async def _ping(self) -> None:
        # Asks the scheduler for its state, so it fails when the scheduler hangs; it also answers while paused.
        await self._get("/server_info")

    async def _hold(self, *, drop_kv: bool) -> None:
        await self._post("/pause_generation", {"mode": "retract" if drop_kv else "in_place"})

    async def _release(self) -> None:
        await self._post("/continue_generation")

    async def _set_version(self, policy_version: int) -> None:
        await self._post("/update_weight_version", {"new_version": str(policy_version), "abort_all_requests": False})

    async def _load(self, folder: Path) -> None:
        await self._post("/update_weights_from_disk", {"model_path": str(folder), "flush_cache": False})

    async def _flush_cache(self) -> None:
        await self._post("/flush_cache")

    async def _digests(self) -> dict[str, str]:
        reply = await self._post("/weights_checker", {"action": "checksum"})
        return {
            f"rank{i}:{name}" if i else name: digest
            for i, rank in enumerate(reply["ranks"])
            for name, digest in rank["checksums"].items()
        }
