"""The work that is given to other trainers and to ours."""

import pytest

from envs import load_domain
from scripts.bench.peers.trl import is_right, question
from trace_async.config import EnvConfig


@pytest.mark.asyncio
async def test_both_sides_ask_the_same_and_toss_the_same_coin():
    domain = load_domain(EnvConfig(name="scripts.bench.peers.trl:Coin"))
    env = domain.make_env(domain.tasks("train")[7])
    assert (await env.init()).messages[0].content == question(7)
    # CRC-32 of "a" is e8b7be43, which is odd; that of "abc" is 352441c2, which is even.
    assert [(await env.step(answer)).reward for answer in ("a", "abc")] == [1.0, 0.0]
    assert is_right("a")
    right = sum(is_right(f"answer {i}") for i in range(1000))
    assert 450 < right < 550  # three standard deviations of 1,000 fair tosses
