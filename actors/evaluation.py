"""Held-out evaluation, inside a run or of a policy on its own."""

from collections.abc import Sequence
from pathlib import Path

from actors.generator_pool import GeneratorPool
from actors.prompt_group import PromptGroup
from envs import load_domain
from envs.tasks import heldout_sample, load_splits
from trace_async.config import Config
from trace_async.tracking.faults import FaultBook
from trace_async.tracking.metrics import eval_metrics
from trace_async.types import Task


async def heldout_metrics(
    prompts: PromptGroup, tasks: Sequence[Task], temperatures: Sequence[float], faults: FaultBook
) -> dict[str, float]:
    """Success of the weights that the generators serve, one rollout per task and temperature.

    What broke down is entered in `faults`; a task that no try could play is left out (`eval_metrics`).
    """
    metrics: dict[str, float] = {}
    tokens = 0
    for temperature in temperatures:
        rollouts = await prompts.evaluate(tasks, temperature)
        for rollout in rollouts:
            faults.enter(rollout.faults)
        tokens += sum(rollout.generated_tokens for rollout in rollouts)
        metrics |= eval_metrics(rollouts, temperature)
    return metrics | {"tokens/eval": float(tokens)}


async def evaluate_policy(config: Config, policy_path: Path, log_dir: Path) -> dict[str, float]:
    """Held-out success of the policy in `policy_path`; needs Ray to be started."""
    domain = load_domain(config.env)
    tasks = heldout_sample(domain, load_splits(domain).heldout, config.eval.num_tasks)
    prompts = PromptGroup(config, policy_path, predictor=None)
    pool = GeneratorPool(config, policy_path, log_dir, prompts.announce)
    prompts.start()
    try:
        await pool.start()
        return await heldout_metrics(prompts, tasks, config.eval.temperatures, FaultBook())
    finally:
        await pool.close()
        prompts.close()
