"""How fast the predictor learns what Stage 1 should buy: python -m scripts.studies.predictor [predictor.…=… budget.…=…]

A stand-in for the start policy: the demonstrator that taught the policy plays every candidate prompt `--rollouts` times
beforehand. Then rounds of Stage 1 are played on these rollouts: the predictor estimates a pool, the rule spends its
roots, the predictor learns from the rollouts bought. Nothing is generated: settings can be compared in a minute.
"""

import argparse
import asyncio
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from random import Random

import numpy as np
import torch

from envs import load_domain
from trace_async.config import Config, load_config
from trace_async.env import Demonstrator, Domain
from trace_async.method.allocation import allocate_roots
from trace_async.method.registry import stage1_rule
from trace_async.policy.load import load_tokenizer
from trace_async.policy.warm_start import make_policy
from trace_async.predictor.metrics import root_outcomes
from trace_async.predictor.predictor import ValuePredictor
from trace_async.rollout.renderer import Renderer
from trace_async.run.dataset import TaskIterator
from trace_async.trees.tree import ROOT, Node, Rollout, RolloutTree
from trace_async.types import PrefixQuery, Task, VersionSpan


async def play(domain: Domain, renderer: Renderer, task: Task, num_rollouts: int, rng: Random) -> RolloutTree:
    """Root rollouts of the demonstrator, with the environment's answers and rewards."""
    assert isinstance(domain, Demonstrator)
    nodes: list[Node] = []
    rollouts = []
    for index in range(num_rollouts):
        env = domain.make_env(task)
        prompt = renderer.render_prompt(await env.init())
        if not nodes:
            nodes.append(Node(parent=-1, rollout=-1, token_ids=prompt, num_generated=0))
        parent, reward = ROOT, 0.0
        for action in domain.demonstrate(task, rng):
            turn = (*renderer.encode_data(action), renderer.stop_token_ids[0])
            result = await env.step(action)
            observed = () if result.done else renderer.render_observation(result.messages, turn_ended=True)
            spans = (VersionSpan(0, 0),)
            n = len(turn)
            nodes.append(
                Node(
                    parent=parent,
                    rollout=index,
                    token_ids=turn + observed,
                    num_generated=n,
                    logprobs=(0.0,) * n,
                    version_spans=spans,
                )
            )
            parent = len(nodes) - 1
            reward = result.reward or 0.0
        await env.close()
        rollouts.append(Rollout(kind="root", anchor=ROOT, leaf=parent, reward=reward))
    return RolloutTree(task=task, nodes=tuple(nodes), rollouts=tuple(rollouts))


def bought(pool: Sequence[RolloutTree], counts: Sequence[int]) -> list[RolloutTree]:
    """Return the first rollouts of each prompt, as many as were bought."""
    trees = []
    for tree, count in zip(pool, counts, strict=True):
        if count:
            last = tree.rollouts[count - 1].leaf
            trees.append(replace(tree, nodes=tree.nodes[: last + 1], rollouts=tree.rollouts[:count]))
    return trees


def prompt_query(tree: RolloutTree) -> PrefixQuery:
    tokens = tree.nodes[ROOT].token_ids
    return PrefixQuery(token_ids=tokens, positions=(len(tokens),))


def known_by_kind(stream: Sequence[RolloutTree]) -> dict[str, float]:
    """Mean success of each kind of question: what a rule that is told the kinds would use."""
    rewards: dict[str, list[float]] = defaultdict(list)
    for tree in stream:
        rewards[tree.task.kind].extend(rollout.reward for rollout in tree.rollouts)
    return {kind: float(np.mean(found)) for kind, found in rewards.items()}


def report(predictor: ValuePredictor, heldout: Sequence[RolloutTree]) -> str:
    """Distance of prompt values from the truth (noise of the truth taken off), and prefixes of what can be learnt."""
    truth = np.array([np.mean([rollout.reward for rollout in tree.rollouts]) for tree in heldout])
    values = np.array([value[0] for value in predictor.predict([prompt_query(tree) for tree in heldout])])
    noise = float(np.mean(truth * (1 - truth))) / (len(heldout[0].rollouts) - 1)
    mixed = [tree for tree, v in zip(heldout, truth, strict=True) if 0 < v < 1]
    found = root_outcomes(mixed, [np.concatenate([[np.nan], v[1:]]) for v in predictor.tree_values(mixed)]).metrics()
    return (
        f"prompts: mse to truth {np.mean((values - truth) ** 2) - noise:.3f} (of {np.var(truth) - noise:.3f}), "
        f"prefixes of mixed prompts: Brier {found['brier']:.3f} (of {found['brier_base']:.3f}), AUC {found['auc']:.2f}"
    )


def run_rounds(config: Config, policy: Path, stream: Sequence[RolloutTree], heldout: Sequence[RolloutTree]) -> None:
    budget = config.budget
    predictor = ValuePredictor(config.predictor, policy, seed=config.seed)
    rng = np.random.default_rng(config.seed)
    kinds = known_by_kind(stream)
    started = time.process_time()
    mixed: dict[str, list[int]] = defaultdict(list)
    for number in range(len(stream) // budget.pool_size):
        pool = stream[number * budget.pool_size : (number + 1) * budget.pool_size]
        estimates = predictor.estimate([tree.task.id for tree in pool], [prompt_query(tree) for tree in pool])
        rule = stage1_rule(budget, number)
        trees = bought(pool, rule.plan(estimates, budget.root_rollouts, rng).tolist())
        told = allocate_roots(
            [kinds[tree.task.kind] for tree in pool], budget.root_rollouts, max_rollouts=budget.max_rollouts
        )
        mixed["bought"].append(sum(tree.has_both_outcomes for tree in trees))
        mixed["told the kinds"].append(sum(tree.has_both_outcomes for tree in bought(pool, told.tolist())))
        predictor.train(trees, number)
        if number + 1 in (1, 2, 4, 8) or (number + 1) % 12 == 0:
            counts = ", ".join(f"{name} {np.mean(found[-4:]):.1f}" for name, found in mixed.items())
            print(f"round {number + 1}: prompts with both outcomes {counts}; {report(predictor, heldout)}")
    print(f"processor time per round, this report included: {(time.process_time() - started) / (number + 1):.2f} s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", default=None)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--rollouts", type=int, default=4, help="played per prompt; caps budget.max_rollouts")
    parser.add_argument("overrides", nargs="*")
    args = parser.parse_args()
    config = load_config(
        args.config, [f"budget.max_rollouts={args.rollouts}", "budget.warmup_rounds=0", *args.overrides]
    )
    torch.set_num_threads(config.predictor.num_threads)
    domain = load_domain(config.env)
    policy = Path(config.policy.path) if config.policy.path else make_policy(domain, config.policy)
    renderer = Renderer(load_tokenizer(policy))
    tasks = TaskIterator(domain.tasks("train"), seed=config.seed).take(args.rounds * config.budget.pool_size)
    rng = Random(f"study/{config.seed}")

    async def play_all(chosen: Sequence[Task], num_rollouts: int) -> list[RolloutTree]:
        return [await play(domain, renderer, task, num_rollouts, rng) for task in chosen]

    stream = asyncio.run(play_all(tasks, args.rollouts))
    heldout = asyncio.run(play_all(domain.tasks("heldout")[:400], 12))
    run_rounds(config, policy, stream, heldout)


if __name__ == "__main__":
    main()
