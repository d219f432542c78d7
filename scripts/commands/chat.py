"""`trace-async chat RUN`: talk with a run's policy in the terminal, or watch it at one of the held-out tasks.

It is sampled by the run's own engine, chat template and sampling settings, without Ray. What it says is shown with
control characters made visible.
"""

import argparse
import asyncio
import sys
import tempfile
from collections.abc import Awaitable, Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from trace_async.config import Config, ConfigError, load_config
from trace_async.engine import Engine, EngineError
from trace_async.env import EnvError
from trace_async.printable import printable
from trace_async.rollout.limits import rollout_limits
from trace_async.rollout.renderer import Renderer
from trace_async.types import Completion, Message, Prompt, SamplingParams, Task

HELP = "/new begins anew, /quit ends"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, metavar="RUN", help="a run's directory, also while it trains")
    parser.add_argument("--prompt", help="say this, print the answer and end")
    parser.add_argument("--system", default="", help="a system message before the first prompt")
    parser.add_argument(
        "--task", type=int, metavar="N", help="play held-out task N with its tools, and show the rollout"
    )
    parser.add_argument("--greedy", action="store_true", help="always the likeliest token")
    parser.add_argument(
        "overrides", nargs="*", metavar="section.name=value", help="such as sampling.max_turn_tokens=200"
    )


class Chat:
    """One conversation. What the policy said stays in the tokens that it wrote."""

    def __init__(
        self,
        renderer: Renderer,
        generate: Callable[[tuple[int, ...], SamplingParams], Awaitable[Completion]],
        params: SamplingParams,
        *,
        max_context_tokens: int,
        system: str = "",
    ) -> None:
        self._renderer = renderer
        self._generate = generate
        self._params = params
        self._max_context_tokens = max_context_tokens
        self._system = system
        self.token_ids: tuple[int, ...] = ()

    async def say(self, text: str) -> str:
        """Return the policy's answer to `text`. Raises ConfigError when the context has no room for one."""
        asked = (*self.token_ids, *self._render(text))
        room = self._max_context_tokens - len(asked)
        if room < 1:
            raise ConfigError(
                f"the conversation fills sampling.max_context_tokens={self._max_context_tokens}: /new begins anew"
            )
        params = replace(self._params, max_new_tokens=min(room, self._params.max_new_tokens))
        said = (await self._generate(asked, params)).token_ids
        self.token_ids = (*asked, *said)
        return self._renderer.decode(said)

    def _render(self, text: str) -> tuple[int, ...]:
        user = Message(role="user", content=text)
        if self.token_ids:
            ended = self.token_ids[-1] in self._renderer.stop_token_ids
            return self._renderer.render_observation([user], turn_ended=ended)
        first = [Message(role="system", content=self._system)] if self._system else []
        return self._renderer.render_prompt(Prompt(messages=(*first, user)))


def run(args: argparse.Namespace) -> int:
    if not (args.run / "config.yaml").is_file():
        raise ConfigError(f"{args.run}: there is no run ({args.run / 'config.yaml'} is missing)")
    if args.task is not None and (args.prompt or args.system):
        raise ConfigError("--task brings prompts of its own: leave --prompt and --system out")
    # The engine is given the policy from disk, merged: no server that others own, and no adapters.
    alone = ["engine.url=''", "engine.lora_rank=0"]
    config = load_config(args.run / "config.yaml", [*args.overrides, *alone])
    with ExitStack() as kept:
        folder = Path(kept.enter_context(tempfile.TemporaryDirectory(prefix="trace_async_chat_")))
        try:
            asyncio.run(_converse(args, config, _policy_of(args.run, folder / "policy"), folder))
        except (EngineError, EnvError) as error:
            print(f"trace-async: {printable(str(error))}", file=sys.stderr)
            return 1
    return 0


def _policy_of(run_dir: Path, target: Path) -> Path:
    """The policy that the run ended with; of one that has not ended, that of its newest checkpoint, put at `target`."""
    from trace_async.learner.state import export_checkpoint
    from trace_async.run.checkpoint import latest_checkpoint

    if (run_dir / "policy" / "config.json").is_file():
        return run_dir / "policy"
    checkpoint = latest_checkpoint(run_dir / "checkpoints")
    if checkpoint is None:
        raise ConfigError(f"{run_dir}: it has neither ended nor saved a checkpoint yet")
    export_checkpoint(checkpoint / "learner", target)
    print(f"the policy of {checkpoint}")
    return target


async def _converse(args: argparse.Namespace, config: Config, policy_path: Path, log_dir: Path) -> None:
    from transformers.utils.logging import disable_progress_bar

    from trace_async.engines import make_engine
    from trace_async.policy.load import load_renderer

    disable_progress_bar()
    renderer = load_renderer(
        policy_path,
        max_observation_tokens=config.sampling.max_observation_tokens,
        template_kwargs=config.policy.chat_template_kwargs,
    )
    engine = make_engine(
        config.engine,
        policy_path=policy_path,
        max_context_tokens=config.sampling.max_context_tokens,
        seed=config.seed,
        log_dir=log_dir,
    )
    temperature = 0.0 if args.greedy else config.sampling.temperature
    params = rollout_limits(config, renderer.stop_token_ids).at(temperature).sampling
    await engine.start()
    try:
        if args.task is not None:
            await _play(config, renderer, engine, args.task, temperature)
            return
        await _talk(args, config, renderer, engine, params)
    finally:
        await engine.close()


async def _talk(
    args: argparse.Namespace, config: Config, renderer: Renderer, engine: Engine, params: SamplingParams
) -> None:
    def begin() -> Chat:
        limit = config.sampling.max_context_tokens
        return Chat(renderer, engine.generate, params, max_context_tokens=limit, system=args.system)

    chat = begin()
    if args.prompt is not None:
        print(printable(await chat.say(args.prompt)))
        return
    print(HELP)
    while (text := await _asked()) is not None:
        if text == "/new":
            chat = begin()
        elif text:
            try:
                print(printable(await chat.say(text)))
            except ConfigError as error:
                print(error)


async def _asked() -> str | None:
    """Return the next line (None: no more). The loop goes on meanwhile, so that a server engine stays attended to."""
    print("> ", end="", flush=True)
    line = await asyncio.to_thread(sys.stdin.readline)
    return None if not line or line.strip() == "/quit" else line.strip()


async def _play(config: Config, renderer: Renderer, engine: Engine, number: int, temperature: float) -> None:
    """One rollout of a held-out task in the run's environment, as `trace-async tree` shows it."""
    from envs import load_domain
    from envs.tasks import load_splits
    from trace_async.rollout.grower import make_grower
    from trace_async.trees.text import tree_text

    domain = load_domain(config.env)
    tasks = load_splits(domain).heldout
    if not 0 <= number < len(tasks):
        raise ConfigError(f"--task {number}: there are {len(tasks)} held-out tasks, from 0")

    async def generate(task: Task, prompt_ids: tuple[int, ...], params: SamplingParams) -> Completion:
        return await engine.generate(prompt_ids, params)

    grower = make_grower(config, domain, renderer, generate)
    try:
        tree = await grower.grow(tasks[number], 1, temperature=temperature)
    finally:
        close = getattr(domain, "close", None)
        if close is not None:
            await close()
    if not tree.rollouts:
        words = "; ".join(fault.words for fault in tree.faults.values())
        raise EnvError(f"the environment broke down: {words or ', '.join(tree.failures)}")
    Console(file=sys.stdout, highlight=False).print(tree_text(tree, renderer.decode), soft_wrap=True, end="")
