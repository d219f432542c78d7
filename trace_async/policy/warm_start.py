"""Make a small start policy where no weights can be downloaded: Qwen3 with a word-level tokenizer.

    demonstrations that the domain generates ─► supervised training ─► a Hugging Face directory, cached

Every token of a demonstration's turns counts 1 in the loss. All others, of prompt and observations, count
`_CONTEXT_WEIGHT`: to predict a little of what is read helps to learn what is to be written.
"""

import asyncio
import hashlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

import numpy as np
import torch
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from trace_async.config import ConfigError, PolicyConfig
from trace_async.env import DemonstrationSource, Demonstrator, Domain
from trace_async.policy.save import save_policy
from trace_async.policy.small_tokenizer import build_tokenizer
from trace_async.rollout.renderer import Renderer
from trace_async.run.dataset import TaskIterator
from trace_async.types import Task

_CONTEXT_WEIGHT = 0.1
_TOKENS_PER_STEP = 3072
_DEMOS_AT_A_TIME = 16
_DEMOS_PER_CHUNK = 512
_FINGERPRINT_DEMOS = 256
_LEARNING_RATE = 4e-3
_MUON_LEARNING_RATE = 8e-3
_HEAD_SIZE = 32


@dataclass(frozen=True, slots=True)
class Demonstration:
    """The tokens of a whole rollout."""

    token_ids: np.ndarray
    """Integers [T]."""
    weights: np.ndarray
    """float32 [T]: how much the prediction of each token counts in the loss."""


def make_policy(domain: Domain, config: PolicyConfig, *, log: Callable[[str], None] = print) -> Path:
    """Return the directory of the small policy for `domain`. It is built unless `config.cache_dir` has it.

    The result follows from `config.seed`. The cache key covers the settings, the bytes of this file and of the
    tokenizer's, the vocabulary and a sample of the demonstrations. Raises ValueError when the domain cannot
    demonstrate. Must not be called inside an event loop.
    """
    if not isinstance(domain, Demonstrator):
        raise ValueError(
            f"domain {domain.name} has no demonstrations (demonstrate, vocabulary): set policy.path to a model"
        )
    tokenizer = build_tokenizer(domain.vocabulary())
    key = _fingerprint(domain, tokenizer, config)
    directory = Path(config.cache_dir) / f"{domain.name}-{key}"
    if directory.is_dir():
        log(f"policy: cached in {directory}")
        return directory
    num_threads = torch.get_num_threads()
    # Two threads are hardly faster at this size and far slower on a busy machine. They also round in another way.
    torch.set_num_threads(1)
    try:
        model = _train(domain, tokenizer, config, log)
    finally:
        torch.set_num_threads(num_threads)
    save_policy(model, tokenizer, directory)
    log(f"policy: {sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters, saved in {directory}")
    return directory


def demonstrations(domain: Domain, renderer: Renderer, seed: int) -> Iterator[Demonstration]:
    """Yield demonstrations of the train tasks without end, as tokens."""
    assert isinstance(domain, Demonstrator)
    shown = domain.demonstration_tasks() if isinstance(domain, DemonstrationSource) else domain.tasks("train")
    tasks = TaskIterator(shown, seed=seed)
    rng = Random(f"demonstrations/{seed}")
    while True:
        chunk = tasks.take(_DEMOS_PER_CHUNK)
        if not chunk:
            raise ConfigError(f"no task can be demonstrated: {tasks.refused[0]}")
        yield from asyncio.run(_play_all(domain, renderer, [(task, domain.demonstrate(task, rng)) for task in chunk]))


async def _play_all(
    domain: Domain, renderer: Renderer, shown: Sequence[tuple[Task, Sequence[str]]]
) -> list[Demonstration]:
    """Play them in order, some at a time: an environment that is a program takes seconds, and little of a core."""
    places = asyncio.Semaphore(_DEMOS_AT_A_TIME)

    async def play(task: Task, turns: Sequence[str]) -> Demonstration:
        async with places:
            return await _play(domain, renderer, task, turns)

    return await asyncio.gather(*(play(task, turns) for task, turns in shown))


async def _play(domain: Domain, renderer: Renderer, task: Task, turns: Sequence[str]) -> Demonstration:
    """Play the domain's turns and record them with what the environment answers."""
    env = domain.make_env(task)
    try:
        tokens = list(renderer.render_prompt(await env.init()))
        weights = [_CONTEXT_WEIGHT] * len(tokens)
        for number, turn in enumerate(turns, 1):
            turn_ids = [*renderer.encode_data(turn), renderer.stop_token_ids[0]]
            tokens += turn_ids
            weights += [1.0] * len(turn_ids)
            result = await env.step(turn)
            if result.done != (number == len(turns)):
                problem = "goes on after the end" if result.done else "stops before the end"
                raise ValueError(f"domain {domain.name}: the demonstration of task {task.id} {problem}: {turns}")
            if not result.done:
                answer = renderer.render_observation(result.messages, turn_ended=True)
                tokens += answer
                weights += [_CONTEXT_WEIGHT] * len(answer)
    finally:
        await env.close()
    return Demonstration(np.array(tokens, dtype=np.int64), np.array(weights, dtype=np.float32))


def batches(demos: Iterator[Demonstration], pad_id: int, seed: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield batches of about `_TOKENS_PER_STEP` tokens without end.

    Each is `token_ids` [B, T], padded at the right, and `weights` [B, T]. A chunk of demonstrations is sorted by length
    before it is cut into batches, so that little of them is padding.
    """
    rng = Random(f"batches/{seed}")
    while True:
        chunk = sorted((next(demos) for _ in range(_DEMOS_PER_CHUNK)), key=lambda demo: len(demo.token_ids))
        groups: list[list[Demonstration]] = [[]]
        for demo in chunk:
            if (len(groups[-1]) + 1) * len(demo.token_ids) > _TOKENS_PER_STEP and groups[-1]:
                groups.append([])
            groups[-1].append(demo)
        rng.shuffle(groups)
        for group in groups:
            token_ids = np.full((len(group), len(group[-1].token_ids)), pad_id, dtype=np.int64)
            weights = np.zeros(token_ids.shape, dtype=np.float32)
            for row, demo in enumerate(group):
                token_ids[row, : len(demo.token_ids)] = demo.token_ids
                weights[row, : len(demo.weights)] = demo.weights
            yield torch.from_numpy(token_ids), torch.from_numpy(weights)


def build_model(tokenizer: PreTrainedTokenizerFast, config: PolicyConfig) -> Qwen3ForCausalLM:
    """Build an untrained Qwen3 with heads of 32, tied embeddings and two query heads for each key head."""
    num_heads = config.hidden_size // _HEAD_SIZE
    return Qwen3ForCausalLM(
        Qwen3Config(
            architectures=["Qwen3ForCausalLM"],
            dtype="float32",
            vocab_size=len(tokenizer),
            hidden_size=config.hidden_size,
            intermediate_size=3 * config.hidden_size,
            num_hidden_layers=config.num_layers,
            num_attention_heads=num_heads,
            num_key_value_heads=max(1, num_heads // 2),
            head_dim=_HEAD_SIZE,
            max_position_embeddings=4096,
            tie_word_embeddings=True,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
        )
    )


def _train(
    domain: Domain, tokenizer: PreTrainedTokenizerFast, config: PolicyConfig, log: Callable[[str], None]
) -> Qwen3ForCausalLM:
    steps = config.warm_start_steps
    log(f"policy: {_DEMOS_PER_CHUNK} demonstrations of {domain.name} are played before the first of {steps} steps")
    pad_id = tokenizer.pad_token_id
    assert isinstance(pad_id, int)
    data = batches(demonstrations(domain, Renderer(tokenizer), config.seed), pad_id, config.seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        model = build_model(tokenizer, config)
    optimizers = _optimizers(model)
    schedules = [
        torch.optim.lr_scheduler.LambdaLR(o, lambda step: learning_rate_factor(step, steps)) for o in optimizers
    ]
    started = time.monotonic()
    for step in range(steps):
        loss = _loss(model, *next(data))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
        if (step + 1) % 50 == 0 or step + 1 == steps:
            seconds = (time.monotonic() - started) / (step + 1)
            left = seconds * (steps - step - 1)
            log(f"policy: step {step + 1}/{steps}, loss {loss.item():.3f}, {seconds:.2f} s a step, {left:.0f} s left")
    return model.eval()


def _optimizers(model: Qwen3ForCausalLM) -> list[torch.optim.Optimizer]:
    """Use Muon (Jordan et al. 2024) for the layers' matrices, and AdamW for embeddings and norms.

    With AdamW alone the policy takes about four times as many steps until it can copy out of its context.
    """
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    return [
        torch.optim.Muon(matrices, lr=_MUON_LEARNING_RATE, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=_LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.0),
    ]


def learning_rate_factor(step: int, steps: int) -> float:
    """Rise over the first twentieth of the steps, stay constant to the middle, then fall linearly to a twentieth."""
    warmup = max(1, steps // 20)
    return min((step + 1) / warmup, 1.0, 0.05 + 0.95 * 2 * (1 - step / steps))


def _loss(model: Qwen3ForCausalLM, token_ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Return the weighted mean cross entropy of a batch. `token_ids` and `weights` are [B, T]."""
    logits = model(input_ids=token_ids[:, :-1], use_cache=False).logits
    targets, target_weights = token_ids[:, 1:], weights[:, 1:]
    losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
    return (losses * target_weights.flatten()).sum() / target_weights.sum()


def _fingerprint(domain: Domain, tokenizer: PreTrainedTokenizerFast, config: PolicyConfig) -> str:
    settings = {name: getattr(config, name) for name in ("seed", "hidden_size", "num_layers", "warm_start_steps")}
    digest = hashlib.blake2b(digest_size=8)
    for source in ("warm_start.py", "small_tokenizer.py"):
        digest.update((Path(__file__).parent / source).read_bytes())
    digest.update(repr(sorted(settings.items())).encode())
    digest.update(tokenizer.backend_tokenizer.to_str().encode())
    demos = demonstrations(domain, Renderer(tokenizer), config.seed)
    for _ in range(_FINGERPRINT_DEMOS):
        demo = next(demos)
        _check_known(demo.token_ids, tokenizer, domain)
        digest.update(demo.token_ids.tobytes())
    return digest.hexdigest()


def _check_known(token_ids: np.ndarray, tokenizer: PreTrainedTokenizerFast, domain: Domain) -> None:
    if (token_ids == tokenizer.unk_token_id).any():
        text = tokenizer.decode(token_ids.tolist())
        raise ValueError(f"domain {domain.name}: vocabulary() lacks characters that its demonstrations use: {text}")
