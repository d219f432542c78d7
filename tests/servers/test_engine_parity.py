"""The check that engines say the same finds the token where they do not."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from scripts.bench.engine_parity import Parting, compare, greedy_trees, main
from trace_async.config import load_config
from trace_async.trees.tree import RolloutTree

SETTINGS = ["env.name=tests.support.parity_domain:Parity", "eval.num_tasks=6", "sampling.max_turn_tokens=8"]


@pytest.fixture(scope="module")
def overrides(tiny_policy_path: Path) -> list[str]:
    return [*SETTINGS, f"policy.path={tiny_policy_path}"]


@pytest.fixture
async def trees(overrides: list[str], tiny_policy_path: Path, tmp_path: Path) -> list[RolloutTree]:
    return await greedy_trees(load_config(None, overrides), tiny_policy_path, tmp_path)


def with_turn(tree: RolloutTree, turn: int, **changes: Any) -> RolloutTree:
    nodes = list(tree.nodes)
    nodes[turn] = replace(nodes[turn], **changes)
    return replace(tree, nodes=tuple(nodes))


async def test_it_finds_where_a_conversation_parts(trees: list[RolloutTree]):
    num_tokens = sum(node.num_generated for tree in trees for node in tree.nodes)
    same = compare(trees, trees)
    assert (same.num_tokens, same.largest, same.partings) == (num_tokens, 0.0, ())

    node = trees[3].nodes[2]
    logprobs = list(node.logprobs)
    logprobs[0] -= 0.25
    logprobs[1] = -1.5
    tokens = list(node.token_ids)
    tokens[1] += 1
    other = [*trees[:3], with_turn(trees[3], 2, token_ids=tuple(tokens), logprobs=tuple(logprobs)), *trees[4:]]
    found = compare(trees, other)
    assert found.largest == pytest.approx(0.25)
    assert found.partings == (Parting(trees[3].task.id, node.logprobs[1], -1.5),)
    assert found.num_tokens == num_tokens - (node.num_generated - 1)

    shorter = with_turn(
        trees[0], 2, token_ids=trees[0].nodes[2].token_ids[:3], num_generated=3, logprobs=trees[0].nodes[2].logprobs[:3]
    )
    shorter = with_turn(shorter, 2, version_spans=trees[0].nodes[2].version_spans[:1])
    (parting,) = compare(trees, [shorter, *trees[1:]]).partings
    assert parting.task_id == trees[0].task.id
    assert math.isnan(parting.theirs)
    broken = replace(trees[0], failures={"dead": 1})
    with pytest.raises(ValueError, match="dead"):
        compare(trees, [broken, *trees[1:]])


def test_an_engine_is_like_itself_and_unlike_a_random_one(overrides: list[str], capsys: pytest.CaptureFixture[str]):
    assert main(["--backends", "torch,torch,fake", *overrides]) == 0
    torch, again, fake, *partings = capsys.readouterr().out.splitlines()
    assert "6 conversations are those of torch" in again
    assert again == torch
    assert fake.startswith("fake: ")
    assert len(partings) >= 5
