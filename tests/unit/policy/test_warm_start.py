"""The small policy: what it is taught, that it learns, that it is cached whole and comes back the same."""

import asyncio
import itertools
from collections.abc import Sequence
from pathlib import Path
from random import Random

import numpy as np
import pytest
import torch

import trace_async.policy.save as save
import trace_async.policy.warm_start as warm_start
from trace_async.config import PolicyConfig
from trace_async.policy.load import load_model, load_tokenizer
from trace_async.policy.warm_start import Demonstration, batches, demonstrations, learning_rate_factor, make_policy
from trace_async.rollout.renderer import Renderer
from trace_async.types import Message, Prompt, Split, StepResult, Task

WORDS = ("red", "green", "blue", "black", "white")


class EchoEnv:
    """Say the word, hear `again`, say it once more."""

    def __init__(self, word: str) -> None:
        self.word, self.heard = word, 0

    async def init(self) -> Prompt:
        return Prompt(messages=(Message(role="user", content=f"say {self.word}"),))

    async def step(self, action: str, *, truncated: bool = False) -> StepResult:
        self.heard += 1
        if self.heard == 2:
            return StepResult(done=True, reward=float(action == self.word))
        return StepResult(messages=(Message(role="tool", content="again"),))

    async def fork(self) -> "EchoEnv":
        raise AssertionError("not needed")

    async def close(self) -> None:
        return None


class Echo:
    name = "echo"
    num_turns = 2

    def tasks(self, split: Split) -> Sequence[Task]:
        return [Task(id=word, domain="echo", kind="k", data={"word": word}) for word in WORDS]

    def make_env(self, task: Task) -> EchoEnv:
        return EchoEnv(str(task.data["word"]))

    def demonstrate(self, task: Task, rng: Random) -> Sequence[str]:
        return [str(task.data["word"])] * self.num_turns

    def vocabulary(self) -> Sequence[str]:
        return [*WORDS, "say", "again"]


class EchoShowingRed(Echo):
    def demonstration_tasks(self) -> Sequence[Task]:
        return self.tasks("train")[:1]


def small(tmp_path: Path, **settings: int) -> PolicyConfig:
    return PolicyConfig(cache_dir=str(tmp_path / "policies"), hidden_size=32, num_layers=1, **settings)  # type: ignore[arg-type]


def test_turns_weigh_one_and_everything_else_a_tenth() -> None:
    tokenizer = warm_start.build_tokenizer(Echo().vocabulary())
    demo = next(demonstrations(EchoShowingRed(), Renderer(tokenizer), seed=0))
    tokens = tokenizer.convert_ids_to_tokens(demo.token_ids.tolist())
    assert list(zip(tokens, demo.weights.astype(float).round(3).tolist(), strict=True)) == [
        *[("<|user|>", 0.1), ("▁say", 0.1), ("▁red", 0.1), ("<|im_end|>", 0.1), ("<|assistant|>", 0.1)],
        *[("▁red", 1.0), ("<|im_end|>", 1.0)],
        *[("<|tool|>", 0.1), ("▁again", 0.1), ("<|im_end|>", 0.1), ("<|assistant|>", 0.1)],
        *[("▁red", 1.0), ("<|im_end|>", 1.0)],
    ]


def test_batches_hold_every_demonstration_once_with_little_padding() -> None:
    rng = np.random.default_rng(0)
    lengths = rng.integers(20, 200, size=512)
    demos = [Demonstration(np.full(n, i + 1), np.full(n, 0.5, dtype=np.float32)) for i, n in enumerate(lengths)]
    seen: list[int] = []
    tokens = 0
    for token_ids, weights in batches(iter(demos), pad_id=0, seed=0):
        assert token_ids.shape == weights.shape
        assert token_ids.numel() <= 3072
        assert torch.equal(token_ids > 0, weights > 0)
        seen += token_ids[:, 0].tolist()
        tokens += token_ids.numel()
        if len(seen) == len(demos):
            break
    assert sorted(seen) == list(range(1, 513))
    assert tokens < 1.1 * lengths.sum()


def test_the_policy_learns_to_echo_and_is_found_in_the_cache(tmp_path: Path) -> None:
    config = small(tmp_path, warm_start_steps=60)
    lines: list[str] = []
    path = make_policy(Echo(), config, log=lines.append)
    assert any("step 50/60" in line for line in lines)
    assert sorted(p.name for p in path.parent.iterdir()) == [path.name]
    renderer, model = Renderer(load_tokenizer(path)), load_model(path)
    assert model.config.vocab_size == renderer.vocab_size
    for word in WORDS:
        prompt = renderer.render_prompt(Prompt(messages=(Message(role="user", content=f"say {word}"),)))
        output = model.generate(torch.tensor([prompt]), max_new_tokens=3, do_sample=False)
        assert output[0, len(prompt) :].tolist() == [*renderer.encode_data(word), *renderer.stop_token_ids]
    lines.clear()
    assert make_policy(Echo(), config, log=lines.append) == path
    assert lines == [f"policy: cached in {path}"]


def test_the_same_seed_gives_the_same_weights_and_another_does_not(tmp_path: Path) -> None:
    def weights(run: str, seed: int) -> dict[str, torch.Tensor]:
        torch.manual_seed(len(run))  # the caller's random state must not matter
        config = small(tmp_path / run, warm_start_steps=2, seed=seed)
        return dict(load_model(make_policy(Echo(), config, log=lambda line: None)).state_dict())

    one, same, other = weights("a", 0), weights("bbb", 0), weights("c", 1)
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not all(torch.equal(one[name], other[name]) for name in one)


def test_the_key_covers_settings_and_demonstrations(tmp_path: Path) -> None:
    def directory(domain: Echo, **settings: int) -> str:
        return make_policy(domain, small(tmp_path, warm_start_steps=1, **settings), log=lambda line: None).name

    names = [directory(Echo()), directory(Echo(), seed=1), directory(EchoShowingRed())]
    assert len(set(names)) == 3


def test_a_kill_midway_leaves_no_half_policy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = small(tmp_path, warm_start_steps=1)
    monkeypatch.setattr(save, "save_file", lambda *args, **kwargs: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        make_policy(Echo(), config, log=lambda line: None)
    assert not list((tmp_path / "policies").iterdir())
    monkeypatch.undo()
    assert load_model(make_policy(Echo(), config, log=lambda line: None)).num_parameters() > 0


def test_demonstrations_that_wait_are_played_some_at_a_time_and_come_in_their_order() -> None:
    playing, most = 0, 0

    class SlowEnv(EchoEnv):
        async def step(self, action: str, *, truncated: bool = False) -> StepResult:
            nonlocal playing, most
            playing += 1
            most = max(most, playing)
            for _ in range(WORDS.index(self.word)):  # in turns of the loop: red ends first, white last
                await asyncio.sleep(0)
            playing -= 1
            return await super().step(action)

    class Slow(Echo):
        def make_env(self, task: Task) -> EchoEnv:
            return SlowEnv(str(task.data["word"]))

    tokenizer = warm_start.build_tokenizer(Echo().vocabulary())
    slow, plain = (demonstrations(domain, Renderer(tokenizer), seed=0) for domain in (Slow(), Echo()))
    for _ in range(20):
        assert next(slow).token_ids.tolist() == next(plain).token_ids.tolist()
    assert most == 16


def test_learning_rate_goes_up_stays_and_comes_down() -> None:
    factors = [learning_rate_factor(step, 100) for step in range(100)]
    assert factors[0] == pytest.approx(0.2)
    assert factors[4] == factors[49] == 1.0
    assert all(a > b for a, b in itertools.pairwise(factors[55:]))
    assert factors[99] == pytest.approx(0.05 + 0.95 * 0.02)


def test_what_cannot_work_is_said(tmp_path: Path) -> None:
    class NoDemonstrator:
        name = "none"

    with pytest.raises(ValueError, match="domain none has no demonstrations"):
        make_policy(NoDemonstrator(), small(tmp_path))  # type: ignore[arg-type]

    class Short(Echo):
        num_turns = 1

    with pytest.raises(ValueError, match=r"the demonstration of task .* stops before the end"):
        make_policy(Short(), small(tmp_path))

    class Long(Echo):
        num_turns = 3

    with pytest.raises(ValueError, match=r"the demonstration of task .* goes on after the end"):
        make_policy(Long(), small(tmp_path))

    class Foreign(Echo):
        def demonstrate(self, task: Task, rng: Random) -> Sequence[str]:
            return ["日本", "日本"]

    with pytest.raises(ValueError, match="lacks characters that its demonstrations use"):
        make_policy(Foreign(), small(tmp_path))
