"""The pages about parts of one's own show programs that work, and these are them."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from docs.own.advantage import LeaveOneOut
from docs.own.allocation import Band, LastTurnsOfFailures
from docs.own.data import Questions
from docs.own.model import make_policy
from envs.contract.check import check_domain
from tests.support.paths import ROOT
from trace_async.config import Config, ConfigError, load_config
from trace_async.engines import make_engine
from trace_async.method.anchors import Anchor
from trace_async.method.credit import compute_credit
from trace_async.method.posterior import Estimates
from trace_async.policy.load import load_tokenizer
from trace_async.rollout.renderer import Renderer
from trace_async.trees.tree import Node, Rollout, RolloutTree
from trace_async.types import Message, Prompt, Task, VersionSpan

OWN = ROOT / "docs" / "own"
PROGRAMS = {path.stem: path for path in OWN.glob("*.py")} | {"environment": ROOT / "envs" / "example.py"}
BUDGET = Config().budget


@pytest.mark.parametrize("page", sorted(OWN.glob("*.md")), ids=lambda path: path.stem)
def test_the_page_shows_the_program_that_is_tested(page: Path):
    program = PROGRAMS[page.stem]
    text = re.sub(r'^""".*?"""\n\n', "", program.read_text(encoding="utf-8"), flags=re.DOTALL)
    assert f"```python\n{text}```\n" in page.read_text(encoding="utf-8")
    assert f"`{program.relative_to(ROOT)}`" in page.read_text(encoding="utf-8")


def test_every_program_has_a_page():
    assert {path.stem for path in OWN.glob("*.md")} == set(PROGRAMS)


def test_the_data_keeps_the_contract(tmp_path: Path):
    path = tmp_path / "mine.jsonl"
    rows = [{"question": f"What is {n} + {n}?", "answer": str(2 * n)} for n in range(100)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    domain = Questions(path=str(path))
    train, heldout = ({task.id for task in domain.tasks(split)} for split in ("train", "heldout"))
    assert (len(train | heldout), train & heldout) == (100, set())
    assert 3 <= len(heldout) <= 20
    assert [finding.text for finding in check_domain(domain) if finding.level == "error"] == []


def test_stage_1_buys_in_the_band_first():
    # Means .9, .5 (of 4 pseudo rollouts), .5 (of 40), .1 and .3; only three of them lie between .2 and .8.
    estimates = Estimates(np.array([9.0, 2.0, 20.0, 1.0, 3.0]), np.array([1.0, 2.0, 20.0, 9.0, 7.0]))
    rng = np.random.default_rng(0)
    assert Band(BUDGET).plan(estimates, 8, rng).tolist() == [0, 0, 4, 0, 4]
    assert Band(BUDGET).plan(estimates, 12, rng).tolist() == [0, 4, 4, 0, 4]
    assert Band(BUDGET).plan(estimates, 20, rng).tolist() == [4, 4, 4, 4, 4]


def test_stage_2_continues_the_latest_turns_of_failures():
    anchors = [
        Anchor(node=node, value=0.5, reward=reward, expected_tokens=10.0, depth=depth)
        for node, (reward, depth) in enumerate([(1.0, 3), (0.0, 1), (0.0, 2), (0.0, 3)])
    ]
    rng = np.random.default_rng(0)
    assert LastTurnsOfFailures(BUDGET).plan(anchors, 2, rng).tolist() == [0, 0, 1, 1]
    assert LastTurnsOfFailures(BUDGET).plan(anchors[:1], 2, rng).tolist() == [0]


def test_each_rollout_is_compared_with_the_others():
    nodes = [Node(parent=-1, rollout=-1, token_ids=(1, 2), num_generated=0)]
    nodes += [
        Node(parent=0, rollout=r, token_ids=(3,), num_generated=1, logprobs=(-0.5,), version_spans=(VersionSpan(0, 0),))
        for r in range(3)
    ]
    rollouts = [Rollout(kind="root", anchor=0, leaf=r + 1, reward=float(r == 0)) for r in range(3)]
    task = Task(id="t", domain="d", kind="k", data={})
    tree = RolloutTree(task=task, nodes=tuple(nodes), rollouts=tuple(rollouts))
    credit = compute_credit("docs.own.advantage:LeaveOneOut", tree)
    # The others' mean is 0 for the success and 1/2 for each failure: A = 1, −1/2, −1/2, each with weight 1/3.
    assert credit.positive.tolist() == pytest.approx([0, 1 / 3, 0, 0])
    assert credit.negative.tolist() == pytest.approx([0, 0, -1 / 6, -1 / 6])
    alone = RolloutTree(task=task, nodes=tree.nodes[:2], rollouts=tree.rollouts[:1])
    assert LeaveOneOut().terms(alone) == []


def test_a_base_model_gets_a_template_and_an_end_of_turn(smollm2_path: Path, tmp_path: Path):
    base = tmp_path / "base"
    tokenizer = AutoTokenizer.from_pretrained(smollm2_path)
    tokenizer.chat_template = None
    tokenizer.save_pretrained(base)
    LlamaForCausalLM(
        LlamaConfig(vocab_size=49_152, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    ).save_pretrained(base)
    make_policy(base, tmp_path / "policy")
    made = load_tokenizer(tmp_path / "policy")
    renderer = Renderer(made)
    ids = renderer.render_prompt(Prompt(messages=(Message(role="user", content="<|im_end|> hello"),)))
    assert made.decode(ids) == "<|im_start|>user\n<|im_end|> hello<|im_end|>\n<|im_start|>assistant\n"
    # The content's own "<|im_end|>" is text; only the template's is the control token.
    assert ids.count(made.convert_tokens_to_ids("<|im_end|>")) == 1


def test_what_cannot_be_an_engine_is_refused_in_words(tiny_policy_path: Path, tmp_path: Path):
    with pytest.raises(ConfigError, match=r"engine.backend=sglnag: expected one of torch \| sglang .*, or package"):
        load_config(None, ["engine.backend=sglnag"])
    config = load_config(None, ["engine.backend=docs.own.engine:Engin"])
    with pytest.raises(ConfigError, match=r"docs.own.engine:Engin: module docs.own.engine has no Engin"):
        make_engine(config.engine, policy_path=tiny_policy_path, max_context_tokens=64, seed=0, log_dir=tmp_path)
