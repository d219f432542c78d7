"""What `--dry-run` says of memory, beside what a learner, a generator and a predictor take on this machine.

    python -m scripts.bench.memory --config configs/quickstart/smollm2.yaml policy.path=DIR

Each process is made alone (no Ray) and given the largest load that the settings allow: a full micro-batch and an
optimizer step, every row of KV in use, a full forward pass with its step. Measured is the peak of resident memory.
"""

import argparse
import asyncio
import multiprocessing
import resource
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from scripts.bench.learner import Shape, make_trees
from trace_async.config import Config, load_config
from trace_async.run.plan import GIB, plan_run
from trace_async.trees.tree import RolloutTree


def full_trees(config: Config, num_tokens: int, vocab: int) -> list[RolloutTree]:
    """Small trees of `num_tokens` unique tokens at most, with both outcomes in each."""
    shape = Shape(trees=1, prompt_tokens=40, roots=2, turns=2, turn_tokens=20, branches=1)
    one = make_trees(shape, vocab, seed=0)[0].num_unique_tokens
    trees = make_trees(replace(shape, trees=max(1, num_tokens // one)), vocab, seed=0)
    return [
        replace(tree, rollouts=tuple(replace(r, reward=float(i % 2)) for i, r in enumerate(tree.rollouts)))
        for tree in trees
    ]


def run_learner(config: Config, path: Path) -> None:
    from trace_async.learner.learner import Learner

    learner = Learner(config, path)
    vocab = learner.policy.config.vocab_size
    learner.update(full_trees(config, 2 * config.learner.max_tokens_per_micro_batch, vocab), 0)
    for _ in learner.weights():
        pass


def run_generator(config: Config, path: Path) -> None:
    from trace_async.engines.embedded.engine import TorchEngine
    from trace_async.types import SamplingParams

    async def serve(log_dir: Path) -> None:
        longest = config.sampling.max_context_tokens
        engine = TorchEngine(config.engine, policy_path=path, max_context_tokens=longest, seed=0, log_dir=log_dir)
        await engine.start()
        scheduler = engine._scheduler
        assert scheduler is not None
        # As after long use: rows of full length, and every slot of the cache written to.
        scheduler._reserve(longest)
        scheduler._kv.fill_(0.0)
        scheduler._pool.fill_(0.0)
        request = SamplingParams(max_new_tokens=4)
        await asyncio.gather(*(engine.generate([9] * 32, request) for _ in range(8)))
        await engine.close()

    with tempfile.TemporaryDirectory() as scratch:
        asyncio.run(serve(Path(scratch)))


def run_predictor(config: Config, path: Path) -> None:
    from trace_async.predictor.predictor import ValuePredictor

    predictor = ValuePredictor(config.predictor, path, seed=0)
    vocab = predictor.model.trunk.config.vocab_size
    trees = full_trees(config, config.predictor.max_tokens_per_forward, vocab)
    predictor.tree_values(trees)
    predictor.train_step(trees)


RUN: dict[str, Callable[[Config, Path], None]] = {
    "learner": run_learner,
    "generator": run_generator,
    "predictor": run_predictor,
}


def peak_bytes(name: str, config: Config, path: Path) -> int:
    import torch

    torch.set_num_threads(1)
    RUN[name](config, path)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path)
    parser.add_argument("--processes", type=lambda text: text.split(","), default=list(RUN))
    parser.add_argument("overrides", nargs="*", metavar="section.name=value")
    args = parser.parse_args()
    config = load_config(args.config, args.overrides)
    plan = {process.name: process for process in plan_run(config).processes}
    print("| process | planned, GiB | measured, GiB | planned ÷ measured |\n|---|---|---|---|")
    for name in args.processes:
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            measured = pool.apply(peak_bytes, (name, config, Path(config.policy.path)))
        planned = plan[name].num_bytes
        print(f"| {name} | {planned / GIB:.2f} | {measured / GIB:.2f} | {planned / measured:.2f} |", flush=True)


if __name__ == "__main__":
    main()
