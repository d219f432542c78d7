"""Engines side by side against static-batch `generate` of transformers, in one run on one model.

    python scripts/bench/engine.py --backends torch,sglang,vllm --requests 1,8,64

Three loads, each of N requests at once and a fixed answer length (a static batch then wastes nothing on stragglers):
  distinct   a prompt of its own for each request
  shared     one common prefix of 200 tokens, new for every measurement, and 8 tokens of one's own
  turns      4 turns of an agent: every turn the whole history is the prompt, and an observation comes after each answer

A number is answer tokens per second (median over rounds; a round runs every contestant once, so that a busy machine
hits all alike), then the ratio to `generate` and the share of prompt tokens that came from the cache.
"""

import argparse
import asyncio
import statistics
import tempfile
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

from trace_async.config import EngineConfig
from trace_async.engine import Engine
from trace_async.engines import make_engine
from trace_async.policy.device import resolve_device
from trace_async.policy.load import load_model
from trace_async.policy.small_tokenizer import build_tokenizer
from trace_async.types import SamplingParams

MAX_CONTEXT = 512
FIRST_TOKEN = 4  # ids below are special in most small vocabularies

# (prompts, answer length) → answers
Generate = Callable[[list[list[int]], int], Awaitable[list[list[int]]]]


@dataclass(frozen=True, slots=True)
class Load:
    """N requests; with `num_turns` > 1 each answer and an observation are appended to its prompt for the next turn."""

    prefix_tokens: int
    own_tokens: int
    answer_tokens: int
    num_turns: int = 1
    observation_tokens: int = 0


LOADS = {
    "distinct": Load(prefix_tokens=0, own_tokens=64, answer_tokens=32),
    "shared": Load(prefix_tokens=200, own_tokens=8, answer_tokens=24),
    "turns": Load(prefix_tokens=0, own_tokens=48, answer_tokens=10, num_turns=4, observation_tokens=8),
}


async def run_load(load: Load, num_requests: int, generate: Generate, rng: np.random.Generator, vocab: int) -> float:
    """Answer tokens per second."""

    def draw(num: int) -> list[int]:
        return [int(token) for token in rng.integers(FIRST_TOKEN, vocab, size=num)]

    prefix = draw(load.prefix_tokens)
    prompts = [[*prefix, *draw(load.own_tokens)] for _ in range(num_requests)]
    started = time.perf_counter()
    for _ in range(load.num_turns):
        answers = await generate(prompts, load.answer_tokens)
        prompts = [
            [*prompt, *answer, *draw(load.observation_tokens)] for prompt, answer in zip(prompts, answers, strict=True)
        ]
    return load.num_turns * num_requests * load.answer_tokens / (time.perf_counter() - started)


def static_batch(model: PreTrainedModel) -> Generate:
    @torch.inference_mode()
    def generate(prompts: list[list[int]], num: int) -> list[list[int]]:
        ids = torch.tensor(prompts, device=model.device)
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=num,
            do_sample=True,
            top_k=0,
            eos_token_id=None,
            pad_token_id=0,
        )
        answers: list[list[int]] = out[:, ids.shape[1] :].tolist()
        return answers

    async def in_loop(prompts: list[list[int]], num: int) -> list[list[int]]:
        return generate(prompts, num)

    return in_loop


def of_engine(engine: Engine) -> Generate:
    async def generate(prompts: list[list[int]], num: int) -> list[list[int]]:
        params = SamplingParams(max_new_tokens=num)
        done = await asyncio.gather(*(engine.generate(prompt, params) for prompt in prompts))
        answers = [list(completion.token_ids) for completion in done]
        assert all(len(answer) == num for answer in answers), "an engine stopped before the agreed length"
        return answers

    return generate


async def measure(
    load: Load, num_requests: int, rounds: int, contestants: dict[str, Generate], engines: dict[str, Engine], vocab: int
) -> dict[str, tuple[float, float]]:
    """Name → (median answer tokens per second, share of prompt tokens served from the cache)."""
    speeds: dict[str, list[float]] = {name: [] for name in contestants}
    before = {name: await engine.health() for name, engine in engines.items()}
    for seed in range(rounds):
        for name, generate in contestants.items():
            rng = np.random.default_rng([seed, num_requests, load.prefix_tokens, load.num_turns])
            speeds[name].append(await run_load(load, num_requests, generate, rng, vocab))
    shares = dict.fromkeys(contestants, 0.0)
    for name, engine in engines.items():
        after = await engine.health()
        prompt_tokens = after.prompt_tokens - before[name].prompt_tokens
        shares[name] = (after.cached_tokens - before[name].cached_tokens) / max(prompt_tokens, 1)
    return {name: (statistics.median(found), shares[name]) for name, found in speeds.items()}


def random_policy(path: Path, hidden_size: int, num_layers: int, vocab_size: int) -> None:
    """An untrained Qwen3 of the quickstart's shape (heads of 32); speed does not depend on what it says."""
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=3 * hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=hidden_size // 32,
        num_key_value_heads=max(1, hidden_size // 64),
        head_dim=32,
        max_position_embeddings=2 * MAX_CONTEXT,
        tie_word_embeddings=True,
        eos_token_id=None,
        bos_token_id=None,
    )
    Qwen3ForCausalLM(config).save_pretrained(path)
    # Without one SGLang makes up an empty tokenizer, and ends answers at its end token, id 0.
    build_tokenizer(()).save_pretrained(path)


async def run(args: argparse.Namespace, policy_path: Path, log_dir: Path) -> None:
    torch.set_num_threads(1)
    device = resolve_device(args.device, name="--device")
    model = load_model(policy_path, device=str(device), dtype=args.dtype)
    vocab = model.config.vocab_size
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    print(f"model: {num_parameters / 1e6:.2f} M parameters, {args.dtype} on {device}, one thread; {args.rounds} rounds")
    contestants = {"generate": static_batch(model)}
    engines: dict[str, Engine] = {}
    try:
        for backend in args.backends:
            config = EngineConfig(
                backend=backend,
                device="cuda" if device.type == "cuda" else "cpu",
                dtype=args.dtype,
                max_running_requests=max(args.requests),
            )
            engine = make_engine(
                config, policy_path=policy_path, max_context_tokens=MAX_CONTEXT, seed=0, log_dir=log_dir
            )
            started = time.perf_counter()
            await engine.start()
            print(f"{backend}: started in {time.perf_counter() - started:.1f} s")
            engines[backend] = engine
            contestants[backend] = of_engine(engine)
        for generate in contestants.values():
            await run_load(LOADS["distinct"], max(args.requests), generate, np.random.default_rng(1), vocab)
        print(f"{'load':10}{'requests':>9}  " + "".join(f"{name:>26}" for name in contestants))
        for load_name in args.loads:
            for num_requests in args.requests:
                found = await measure(LOADS[load_name], num_requests, args.rounds, contestants, engines, vocab)
                base = found["generate"][0]
                cells = (f"{speed:8.0f} {speed / base:6.2f}× {share:6.0%} hit" for speed, share in found.values())
                print(f"{load_name:10}{num_requests:9}  " + "".join(f"{cell:>26}" for cell in cells), flush=True)
    finally:
        for engine in engines.values():
            await engine.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backends", type=lambda text: text.split(","), default=["torch"])
    parser.add_argument("--requests", type=lambda text: [int(n) for n in text.split(",")], default=[1, 8, 64])
    parser.add_argument("--loads", type=lambda text: text.split(","), default=list(LOADS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--policy", type=Path, help="a model directory; by default a random one is made")
    parser.add_argument("--hidden-size", type=int, default=128)
    parser.add_argument("--num-layers", type=int, default=3)
    parser.add_argument("--vocab-size", type=int, default=200, help="120 or more")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        policy_path = args.policy
        if policy_path is None:
            policy_path = Path(scratch) / "policy"
            random_policy(policy_path, args.hidden_size, args.num_layers, args.vocab_size)
        asyncio.run(run(args, policy_path, Path(scratch)))


if __name__ == "__main__":
    main()
