"""Single-turn GRPO by TRL's GRPOTrainer and by this trainer: seconds an update, alternating in one run.

    .venv/bin/python -m pip install --no-deps --target .venvs/trl \
        trl==1.16.0 datasets==5.2.0 dill==0.4.1 multiprocess==0.70.19
    python -m scripts.bench.peers.trl --answers 8,64 --updates 12 --repeats 2

Both train the same policy on the same prompts, 16 prompts × 8 answers an update, one optimiser step each. Whether an
answer is right is a coin that its text tosses, so every group has credit, and answers are as long as they may be: this
compares speed, not learning. The policy is the quickstart's size, untrained (--policy takes any folder). TRL generates
with transformers' `generate` and uses all cores, as it comes; here a generator and a learner have one thread each and
work side by side, `actors.max_staleness` updates apart. The first two updates are left out.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any

from trace_async.config import PolicyConfig
from trace_async.tracking.log import read_metrics
from trace_async.types import Message, Prompt, Split, StepResult, Task

WORDS = tuple(f"word{index}" for index in range(300))
PROMPTS, ANSWERS = 16, 8
LEFT_OUT = 2
ROOT = Path(__file__).resolve().parents[3]


def question(number: int) -> str:
    return " ".join(Random(number).choices(WORDS, k=30))


def is_right(answer: str) -> bool:
    """Say whether an answer is right, by a coin that the answer tosses."""
    return bool(zlib.crc32(answer.encode()) & 1)


class Coin:
    """The domain: `env.name=scripts.bench.peers.trl:Coin`."""

    name = "coin"

    def tasks(self, split: Split) -> Sequence[Task]:
        numbers = range(1000) if split == "train" else range(1000, 1001)
        return [Task(id=f"{split}-{i}", domain=self.name, kind="coin", data={"number": i}) for i in numbers]

    def make_env(self, task: Task) -> "CoinEnv":
        return CoinEnv(task)


class CoinEnv:
    """One question, one answer."""

    def __init__(self, task: Task) -> None:
        self.number = int(str(task.data["number"]))

    async def init(self) -> Prompt:
        return Prompt(messages=(Message(role="user", content=question(self.number)),))

    async def step(self, action: str, *, truncated: bool = False) -> StepResult:
        return StepResult(done=True, reward=float(is_right(action)))

    async def fork(self) -> "CoinEnv":
        return CoinEnv(Task(id="", domain="coin", kind="coin", data={"number": self.number}))

    async def close(self) -> None: ...


def make_policy(folder: Path) -> Path:
    from trace_async.policy.small_tokenizer import build_tokenizer
    from trace_async.policy.warm_start import build_model

    tokenizer = build_tokenizer(WORDS)
    tokenizer.save_pretrained(folder)
    build_model(tokenizer, PolicyConfig()).save_pretrained(folder)
    return folder


def train_with_trl(policy: str, answer_tokens: int, updates: int, output: str) -> None:
    """In a process of its own: writes Unix seconds and generated tokens of every update to `output`."""
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    tokens, ends = 0, []

    def reward(completions: list[Any], completion_ids: list[list[int]], **_: Any) -> list[float]:
        nonlocal tokens
        tokens += sum(map(len, completion_ids))
        return [float(is_right(completion[0]["content"])) for completion in completions]

    class Clock(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            ends.append((time.time(), tokens))

    prompts = [{"prompt": [{"role": "user", "content": question(i)}]} for i in range(1000)]
    settings = GRPOConfig(
        output_dir=f"{output}.trl",
        per_device_train_batch_size=PROMPTS * ANSWERS,
        num_generations=ANSWERS,
        max_completion_length=answer_tokens,
        max_steps=updates,
        learning_rate=1e-6,
        loss_type="grpo",
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        logging_steps=10_000,
        disable_tqdm=True,
    )
    GRPOTrainer(
        policy, reward_funcs=reward, args=settings, train_dataset=Dataset.from_list(prompts), callbacks=[Clock()]
    ).train()
    Path(output).write_text(json.dumps(ends))


def trl_seconds(policy: Path, answer_tokens: int, updates: int, folder: Path) -> tuple[float, float]:
    """Return seconds and generated tokens of an update by TRL."""
    output = folder / f"trl-{answer_tokens}-{time.time_ns()}.json"
    code = "import sys; from scripts.bench.peers.trl import train_with_trl as t; t(sys.argv[1], int(sys.argv[2]), "
    code += "int(sys.argv[3]), sys.argv[4])"
    search = os.pathsep.join([str(ROOT), str(ROOT / ".venvs" / "trl")])
    environment = os.environ | {"PYTHONPATH": search, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(os.cpu_count())}
    arguments = [sys.executable, "-c", code, str(policy), str(answer_tokens), str(updates), str(output)]
    subprocess.run(arguments, check=True, env=environment, cwd=folder, stdout=subprocess.DEVNULL)
    ends = json.loads(output.read_text())
    (began, before), (end, after) = ends[LEFT_OUT - 1], ends[-1]
    return (end - began) / (updates - LEFT_OUT), (after - before) / (updates - LEFT_OUT)


def our_seconds(
    policy: Path, answer_tokens: int, updates: int, folder: Path, extra: Sequence[str]
) -> tuple[float, float]:
    """Return seconds and generated tokens of an update by this trainer."""
    name = f"ours-{answer_tokens}-{time.time_ns()}"
    settings = [
        "env.name=scripts.bench.peers.trl:Coin",
        f"policy.path={policy}",
        f"budget.root_rollouts={PROMPTS * ANSWERS}",
        f"budget.pool_size={PROMPTS}",
        f"budget.uniform_rollouts={ANSWERS}",
        f"budget.max_rollouts={ANSWERS}",
        "budget.stage1=uniform",
        "budget.stage2=none",
        "budget.continuations_per_root=0",
        "predictor.steps_per_update=0",
        "predictor.trunk=own",
        "predictor.num_layers=1",
        "loss.advantage=grpo",
        "learner.learning_rate=1e-6",
        f"sampling.max_turn_tokens={answer_tokens}",
        "sampling.max_context_tokens=512",
        "eval.num_tasks=1",
        "eval.every_updates=0",
        "checkpoint.every_updates=0",
        f"num_updates={updates}",
        f"output_dir={folder}",
        f"name={name}",
        f"tracking.uri=sqlite:///{folder}/mlflow.db",
        *extra,
    ]
    arguments = [sys.executable, "-m", "scripts.cli", "train", *settings]
    subprocess.run(arguments, check=True, cwd=ROOT, stdout=subprocess.DEVNULL)
    points = [point for point in read_metrics(folder / name) if "time/step_s" in point.metrics]
    began, end = points[LEFT_OUT - 1], points[-1]
    tokens = end.metrics["tokens/generated_total"] - began.metrics["tokens/generated_total"]
    return (end.time - began.time) / (updates - LEFT_OUT), tokens / (updates - LEFT_OUT)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--answers", type=lambda text: [int(n) for n in text.split(",")], default=[8, 64])
    parser.add_argument("--updates", type=int, default=12)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--policy", type=Path)
    parser.add_argument("overrides", nargs="*", help="settings of our side")
    args = parser.parse_args()
    heads = ("TRL, s/update", "tokens/s", "ours, s/update", "tokens/s", "ours ÷ TRL")
    print(f"{'answer':>7}" + "".join(f"{head:>16}" for head in heads))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        policy = args.policy or make_policy(folder / "policy")
        for answer_tokens in args.answers:
            for _ in range(args.repeats):
                theirs, their_tokens = trl_seconds(policy, answer_tokens, args.updates, folder)
                ours, our_tokens = our_seconds(policy, answer_tokens, args.updates, folder, args.overrides)
                speeds = (their_tokens / theirs, our_tokens / ours)
                print(
                    f"{answer_tokens:>7}{theirs:>16.2f}{speeds[0]:>16.0f}{ours:>16.2f}{speeds[1]:>16.0f}"
                    f"{speeds[1] / speeds[0]:>15.2f}×",
                    flush=True,
                )


if __name__ == "__main__":
    main()
