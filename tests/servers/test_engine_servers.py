"""The real servers, SGLang and vLLM: the conformance suite, and what can go wrong with a process."""

import asyncio
import errno
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any, ClassVar

import pytest

from tests.conformance.engine_conformance import MAX_CONTEXT, EngineConformance, Harness
from tests.support.paths import ROOT
from trace_async.config import EngineConfig
from trace_async.engine import EngineDeadError, EngineRequestError, EngineTimeoutError, WeightSyncError
from trace_async.engines import make_engine
from trace_async.engines.servers.http_engine import HttpEngine
from trace_async.engines.vllm_worker.weight_group import WeightGroup
from trace_async.policy.load import load_model
from trace_async.policy.small_tokenizer import build_tokenizer
from trace_async.types import SamplingParams
from trace_async.weights import unpack_weights

pytestmark = pytest.mark.slow

LIMIT_S = 60.0
LONG = SamplingParams(max_new_tokens=470)


def needs(backend: str) -> pytest.MarkDecorator:
    """Skips where the engine's environment is missing, except in CI, where that is a failure."""
    missing = not (ROOT / ".venvs" / backend / "bin" / "python").is_file() and os.environ.get("CI") != "true"
    return pytest.mark.skipif(missing, reason=f"no .venvs/{backend}: run `bash scripts/setup_engines.sh {backend}`")


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def footprint(engine: HttpEngine) -> tuple[set[Path], set[int]]:
    """What a running server has outside its processes: its private folders, and inodes of shared memory."""
    process = engine._process
    assert process is not None
    inodes = set()
    for pid in process.process_ids():
        lines = [line.split(maxsplit=5) for line in Path(f"/proc/{pid}/maps").read_text().splitlines()]
        inodes |= {int(fields[4]) for fields in lines if len(fields) == 6 and fields[5].startswith("/dev/shm/")}
    return {process.scratch, process.shared_scratch}, inodes


def require_nothing_left(footprints: list[tuple[set[Path], set[int]]]) -> None:
    left = {entry.inode(): entry.name for entry in os.scandir("/dev/shm")}
    for folders, inodes in footprints:
        assert not [folder for folder in folders if folder.exists()]
        assert not [left[inode] for inode in inodes if inode in left]


def exists(*paths: str) -> bool:
    return any(Path(path).exists() for path in paths)


def command_line(pid: int) -> bytes:
    return Path(f"/proc/{pid}/cmdline").read_bytes()


class ServerConformance(EngineConformance):
    """What engines with a process of their own must do beyond the suite."""

    settings: ClassVar[dict[str, Any]] = {"request_timeout_s": 60.0}

    def _engine(self, policy_path: Path, log_dir: Path, **settings: Any) -> HttpEngine:
        config = EngineConfig(backend=self.backend, device="cpu", **settings)
        engine = make_engine(config, policy_path=policy_path, max_context_tokens=MAX_CONTEXT, seed=0, log_dir=log_dir)
        assert isinstance(engine, HttpEngine)
        return engine

    async def num_running_in_server(self, engine: HttpEngine) -> int:
        raise NotImplementedError

    async def test_an_aborted_request_stops_in_the_server(self, harness):
        """Three requests are cancelled; the server is rid of them before a shorter one that runs beside them ends."""
        engine = harness.engine
        for _ in range(8):
            beside = asyncio.create_task(engine.generate(harness.prompt(20), SamplingParams(max_new_tokens=400)))
            cancelled = asyncio.gather(*(engine.generate(harness.prompt(20), LONG) for _ in range(3)))
            while not beside.done() and await self.num_running_in_server(engine) < 4:
                await asyncio.sleep(0.01)
            cancelled.cancel()
            while not beside.done():
                if await self.num_running_in_server(engine) <= 1 and not beside.done():
                    await beside
                    return
            await beside
        pytest.fail("the server went on with cancelled requests until a shorter one had ended, 8 times out of 8")

    async def test_ids_that_the_tokenizer_lacks(self, tiny_policy_path, tmp_path):
        # As in real models, whose vocabularies are padded; one that marks spaces is what vLLM died of.
        padded = shutil.copytree(tiny_policy_path, tmp_path / "padded")
        build_tokenizer(()).save_pretrained(padded)
        tokenizer = json.loads((padded / "tokenizer.json").read_text())
        tokenizer["model"]["vocab"] = {word: i for word, i in tokenizer["model"]["vocab"].items() if i < 50}
        (padded / "tokenizer.json").write_text(json.dumps(tokenizer))
        engine = self._engine(padded, tmp_path)
        await engine.start()
        try:
            harness = Harness(engine, padded, load_model(padded))
            prompt = harness.prompt(20)
            completions = await harness.generate(prompt, n=4, max_new_tokens=40)
            assert sum(token >= 50 for completion in completions for token in completion.token_ids) > 9
            for completion in completions:
                harness.check_logprobs(prompt, completion)
        finally:
            await engine.close()

    async def test_attach_to_a_running_server(self, harness, tmp_path):
        guest = self._engine(harness.policy_path, tmp_path, url=harness.engine._http._url)
        await guest.start()
        prompt = harness.prompt(20)
        try:
            await guest.update_weights(harness.new_weights())
            completion = await guest.generate(prompt, SamplingParams(max_new_tokens=10))
            assert completion.version_spans[0].policy_version == harness.version + 1
            assert guest.process_ids() == []
        finally:
            await guest.close()
        await harness.update(harness.new_weights(noise=0.07))
        harness.check_logprobs(prompt, (await harness.generate(prompt, max_new_tokens=10))[0])

    @pytest.mark.timeout(900)
    async def test_faults_of_the_process(self, tiny_policy_path, tmp_path):
        """Killed, hanging, and started anew: one server after another, since a start takes its time."""
        engine = self._engine(tiny_policy_path, tmp_path, request_timeout_s=4.0)
        footprints = []
        try:
            await engine.start()
            footprints.append(footprint(engine))
            harness = Harness(engine, tiny_policy_path, load_model(tiny_policy_path))
            await harness.update(harness.new_weights())
            await self._killed(harness)
            await self._started_again(harness)
            footprints.append(footprint(engine))
            await self._hanging(harness)
            await engine.start()
            footprints.append(footprint(engine))
            await self._worker_killed(harness)
            await engine.start()
            footprints.append(footprint(engine))
            await self._closed_with_requests_in_flight(harness)
        finally:
            await engine.close()
        require_nothing_left(footprints)

    async def _killed(self, harness: Harness) -> None:
        pids = harness.engine.process_ids()
        task = asyncio.create_task(harness.engine.generate(harness.prompt(20), LONG))
        await asyncio.sleep(0.1)
        os.kill(pids[0], signal.SIGKILL)
        with pytest.raises(EngineDeadError):
            await asyncio.wait_for(task, LIMIT_S)
        with pytest.raises(EngineDeadError, match=r"log: .*\.log"):
            await harness.generate(harness.prompt(5))
        with pytest.raises(EngineDeadError):
            await harness.engine.health()
        async with asyncio.timeout(LIMIT_S):
            while any(alive(pid) for pid in pids):
                await asyncio.sleep(0.05)

    async def _started_again(self, harness: Harness) -> None:
        await harness.engine.start()
        health = await harness.engine.health()
        assert (health.policy_version, health.generated_tokens) == (0, 0)
        # The fresh server has the weights of the policy's directory until it is synced.
        weights = harness.new_weights()
        await harness.engine.update_weights(weights)
        await harness.engine.update_weights(weights)  # a second sync of what it has is no error
        harness.old_weights.clear()
        harness.model.load_state_dict(unpack_weights(weights), strict=False)
        harness.version = weights.manifest.policy_version
        prompt = harness.prompt(30)
        (completion,) = await harness.generate(prompt, max_new_tokens=20)
        harness.check_logprobs(prompt, completion)

    async def _hanging(self, harness: Harness) -> None:
        pids = harness.engine.process_ids()
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
        async with asyncio.timeout(LIMIT_S):
            with pytest.raises(EngineTimeoutError, match="4 s"):
                await harness.generate(harness.prompt(20))
            with pytest.raises(EngineTimeoutError):
                await harness.engine.health()
        await harness.engine.close()
        assert not any(alive(pid) for pid in pids)

    async def _worker_killed(self, harness: Harness) -> None:
        """The process that runs the model dies, and the one that listens may live on."""
        pids = harness.engine.process_ids()
        worker = next(pid for pid in pids[1:] if b"tracker" not in command_line(pid))
        os.kill(worker, signal.SIGKILL)
        with pytest.raises((EngineDeadError, EngineTimeoutError)):
            await harness.generate(harness.prompt(20))
        with pytest.raises((EngineDeadError, EngineTimeoutError)):
            await harness.engine.health()

    async def _closed_with_requests_in_flight(self, harness: Harness) -> None:
        engine = harness.engine
        port = int(engine._http._url.rpartition(":")[2])
        pids = engine.process_ids()
        task = asyncio.create_task(engine.generate(harness.prompt(20), LONG))
        await asyncio.sleep(0.1)
        await engine.close()
        with pytest.raises(EngineDeadError):
            await task
        with pytest.raises(EngineDeadError):
            await harness.generate(harness.prompt(5))
        assert not any(alive(pid) for pid in pids)
        with socket.socket() as probe:
            assert probe.connect_ex(("127.0.0.1", port)) == errno.ECONNREFUSED

    async def test_a_server_that_cannot_start_says_why(self, tiny_policy_path, tmp_path):
        engine = self._engine(tiny_policy_path, tmp_path, server_args={"no_such_flag": 1})
        with pytest.raises(EngineDeadError, match="no-such-flag"):
            await engine.start()
        assert engine.process_ids() == []

    async def test_the_server_dies_with_its_owner(self, tiny_policy_path, tmp_path):
        program = textwrap.dedent(
            f"""
            import asyncio
            from pathlib import Path
            from trace_async.config import EngineConfig
            from trace_async.engines import make_engine

            async def main():
                path = Path({str(tiny_policy_path)!r})
                config = EngineConfig(backend={self.backend!r}, device="cpu")
                log_dir = Path({str(tmp_path)!r})
                engine = make_engine(config, policy_path=path, max_context_tokens=512, seed=0, log_dir=log_dir)
                await engine.start()
                folders = engine._process.scratch, engine._process.shared_scratch
                print("server", *folders, *engine.process_ids(), flush=True)
                await asyncio.sleep(600)

            asyncio.run(main())
            """
        )
        owner = subprocess.Popen(  # noqa: ASYNC220 - it returns at once
            [sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, cwd=ROOT
        )
        assert owner.stdout is not None
        line = ""
        while not line.startswith("server"):
            line = await asyncio.to_thread(owner.stdout.readline)
            assert line, "the owner ended early"
        scratch, shared_scratch, *numbers = line.split()[1:]
        pids = [int(number) for number in numbers]
        assert all(alive(pid) for pid in pids)
        owner.kill()
        owner.wait()
        async with asyncio.timeout(LIMIT_S):
            while any(alive(pid) for pid in pids) or exists(scratch, shared_scratch):
                await asyncio.sleep(0.05)


@needs("sglang")
class TestSGLang(ServerConformance):
    backend = "sglang"

    async def num_running_in_server(self, engine: HttpEngine) -> int:
        reply = await engine._get("/v1/loads")
        return sum(load["num_running_reqs"] + load["num_waiting_reqs"] for load in reply["loads"])


@pytest.mark.asyncio(loop_scope="class")
class PartOfTheSuite:
    """Answers and weight updates, for servers that are set up another way."""

    backend: ClassVar[str]
    settings: ClassVar[dict[str, Any]]
    long_answer: ClassVar[int] = EngineConformance.long_answer
    cache_granularity: ClassVar[int] = EngineConformance.cache_granularity
    prefix_cache: ClassVar[bool] = EngineConformance.prefix_cache

    harness = EngineConformance.harness
    needs_prefix_cache = EngineConformance.needs_prefix_cache
    test_greedy = EngineConformance.test_greedy_equals_hugging_face
    test_in_flight = EngineConformance.test_an_update_in_flight_splits_the_answer_by_version
    test_no_stale_kv = EngineConformance.test_no_stale_kv_is_served_after_an_update
    test_bad_updates = EngineConformance.test_a_bad_update_is_an_error_and_a_good_one_heals
    _bad_update = EngineConformance._bad_update


class BroadcastConformance(PartOfTheSuite):
    """Weights over a process group (gloo here) in place of a file."""

    settings: ClassVar[dict[str, Any]] = {"weight_sync": "collective", "request_timeout_s": 30.0}


class SplitConformance(PartOfTheSuite):
    """The model split over two workers (tensor parallelism)."""

    settings: ClassVar[dict[str, Any]] = {"tensor_parallel_size": 2, "request_timeout_s": 60.0}


@needs("sglang")
class TestSGLangSplit(SplitConformance):
    backend = "sglang"


@needs("vllm")
class TestVLLMSplit(SplitConformance):
    backend = "vllm"
    cache_granularity = 32
    long_answer = 470
    # Every worker is then a receiver of its own.
    settings: ClassVar[dict[str, Any]] = {**SplitConformance.settings, "weight_sync": "collective"}


@needs("sglang")
class TestSGLangByBroadcast(BroadcastConformance):
    backend = "sglang"


@needs("vllm")
class TestVLLMByBroadcast(BroadcastConformance):
    backend = "vllm"
    cache_granularity = 32
    long_answer = 470

    async def test_a_broadcast_that_breaks_is_an_error_and_the_next_one_makes_a_new_group(self, harness, monkeypatch):
        def breaks(group: WeightGroup, tensors: object) -> None:
            raise RuntimeError("connection closed by peer")

        await harness.update(harness.new_weights())
        with monkeypatch.context() as patched:
            patched.setattr(WeightGroup, "send", breaks)
            with pytest.raises(WeightSyncError):
                await asyncio.wait_for(harness.engine.update_weights(harness.new_weights(noise=0.06)), LIMIT_S)
        with pytest.raises(WeightSyncError, match="must be synced"):
            await harness.generate(harness.prompt(20))
        await harness.update(harness.new_weights(noise=0.07))
        prompt = harness.prompt(20)
        harness.check_logprobs(prompt, (await harness.generate(prompt, max_new_tokens=10))[0])


class RefusesTruncation(EngineConformance):
    """vLLM's log-probabilities would be renormalised, so such requests are refused."""

    async def test_top_k_and_top_p_cut_the_tail_and_leave_logprobs_as_they_are(self, harness):
        for params in ({"top_k": 3}, {"top_p": 0.5}):
            with pytest.raises(EngineRequestError, match="top_p=1"):
                await harness.generate(harness.prompt(10), **params)


@needs("vllm")
class TestVLLM(RefusesTruncation, ServerConformance):
    backend = "vllm"
    cache_granularity = 32
    long_answer = 470

    async def num_running_in_server(self, engine: HttpEngine) -> int:
        async with engine._http._session.get(engine._http._url + "/metrics") as response:
            lines = (await response.text()).splitlines()
        names = ("vllm:num_requests_running", "vllm:num_requests_waiting{")
        return int(sum(float(line.split()[-1]) for line in lines if line.startswith(names)))
