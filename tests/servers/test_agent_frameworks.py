"""Agents written in frameworks that know nothing of training, in an environment of their own (.venvs/agents)."""

import json
from collections.abc import Sequence

import numpy as np
import pytest

from envs.agent.example import Follow, make_task
from tests.support.paths import ROOT
from tests.support.scripted_policy import ScriptedPolicy, grow_tree
from trace_async.method.anchors import Anchor
from trace_async.rollout.expansion import Expansion

PYTHON = ROOT / ".venvs" / "agents" / "bin" / "python"
AGENTS = ROOT / "docs" / "agents"
FRAMEWORKS = ["openai_loop", "openai_agents_sdk", "pydantic_ai_agent", "langgraph_agent", "smolagents_agent"]
FRAMEWORKS += ["anthropic_loop", "openai_responses"]

pytestmark = pytest.mark.skipif(not PYTHON.exists(), reason="no .venvs/agents: scripts/setup_agents.sh makes it")


def follows_signs(task: dict) -> ScriptedPolicy:
    """Looks at the sign of every place on the way, and says the last one; smolagents wants that as a call."""

    def say(context: str) -> str:
        hops = context.count("<|im_start|>assistant\n") - 1
        place = task["start"]
        for _ in range(hops):
            place = task["signs"][place]
        if hops < task["hops"]:
            return f'<tool_call>\n{{"name": "look", "arguments": {{"place": "{place}"}}}}\n</tool_call>'
        if '"name": "final_answer"' in context:
            return f'<tool_call>\n{{"name": "final_answer", "arguments": {{"answer": "{place}"}}}}\n</tool_call>'
        return f"at {place}"

    return ScriptedPolicy(say)


@pytest.mark.parametrize("way", ["command", "fork"])
@pytest.mark.parametrize("framework", FRAMEWORKS)
async def test_a_frameworks_agent_is_rolled_out_and_continued_by_replay(framework: str, way: str):
    if way == "command":
        domain = Follow(command=[str(PYTHON), str(AGENTS / f"{framework}.py")], seed=7)
    else:
        domain = Follow(agent=f"{framework}:solve", python=str(PYTHON), cwd=str(AGENTS), seed=7)
    task = domain.tasks("train")[0]
    assert task.data["hops"] == 3
    policy = follows_signs(dict(task.data))

    def plan(anchors: Sequence[Anchor], budget: int) -> np.ndarray:
        return np.array([0] * (len(anchors) - 1) + [budget])

    try:
        tree = await grow_tree(domain, policy, Expansion(plan=plan, per_root=2), max_context_tokens=20_000)
    finally:
        await domain.close()
    assert tree.failures == {}, tree.faults
    assert [rollout.kind for rollout in tree.rollouts] == ["root", "continuation", "continuation"]
    assert [rollout.reward for rollout in tree.rollouts] == [1.0] * 3
    # One conversation, of which every request is the last one and what was new: nothing was tokenised twice.
    assert all(node.follows is None for node in tree.nodes)
    assert len(policy.prompts) == 4 + 2
    assert policy.prompts[3] == tree.prefix_tokens(3) == policy.prompts[4] == policy.prompts[5]


def test_tasks_are_such_that_the_signs_lead_to_the_answer():
    import random

    for seed in range(20):
        task = json.loads(json.dumps(make_task(random.Random(seed))))
        place = task["start"]
        for _ in range(task["hops"]):
            place = task["signs"][place]
        assert place == task["answer"]
