"""`trace-async tree` on a run directory as training leaves it."""

import json
import re
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest

from scripts import cli
from tests.ray.test_end_to_end import command
from trace_async.config import config_to_yaml, load_config
from trace_async.policy.small_tokenizer import build_tokenizer
from trace_async.trees.io import trees_path, write_trees
from trace_async.trees.tree import Node, Rollout, RolloutTree
from trace_async.types import Task, VersionSpan


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """Two updates; in the second, tree 0 has one outcome and tree 1 both."""
    tokenizer = build_tokenizer(["who", "made", "it", "ada", "bob", "answer"])
    policy = tmp_path / "policy"
    tokenizer.save_pretrained(policy)
    (policy / "config.json").write_text('{"model_type": "qwen3"}')
    config = load_config(None, ["loss.advantage=trace", "name=shown"])
    (tmp_path / "config.yaml").write_text(config_to_yaml(config))

    def ids(text: str) -> tuple[int, ...]:
        return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])

    def tree(rewards: tuple[float, float]) -> RolloutTree:
        turns = [
            Node(
                parent=0,
                rollout=i,
                token_ids=ids(f"answer {name}"),
                num_generated=2,
                logprobs=(-0.5, -0.5),
                version_spans=(VersionSpan(0, 3),),
            )
            for i, name in enumerate(("ada", "bob"))
        ]
        return RolloutTree(
            task=Task(id="q1", domain="multihop", kind="1-hop", data={}),
            nodes=(Node(parent=-1, rollout=-1, token_ids=ids("who made it"), num_generated=0, value=0.5), *turns),
            rollouts=tuple(Rollout(kind="root", anchor=0, leaf=i + 1, reward=r) for i, r in enumerate(rewards)),
        )

    write_trees(trees_path(tmp_path, 1), [tree((1.0, 0.0))])
    write_trees(trees_path(tmp_path, 2), [tree((0.0, 0.0)), tree((1.0, 0.0))])
    return tmp_path


def test_the_first_tree_with_both_outcomes_of_the_last_update(
    run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["tree", str(run_dir)]) == 0
    shown = capsys.readouterr().out
    assert "update 2, tree 1 of 2" in shown
    assert "1 of 2 succeeded" in shown
    # `trace`: leave-one-out ±1, each with weight 1/2.
    assert "├─● turn 1, rollout 0  credit +0.500  ✓ reward 1" in shown
    assert "└─● turn 1, rollout 1  credit -0.500  ✗ reward 0" in shown
    assert "answer ada" in shown
    assert "who made it" in shown


def test_all_trees_are_listed_and_made_a_page(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["tree", str(run_dir), "--list"]) == 0
    assert [line.split("   ")[0] for line in capsys.readouterr().out.splitlines()] == [
        "--update 1 --index 0",
        "--update 2 --index 0",
        "--update 2 --index 1",
    ]
    page = run_dir / "trees.html"
    assert cli.main(["tree", str(run_dir), "--html", str(page)]) == 0
    assert [(update, len(trees)) for update, trees in _embedded(page)] == [(1, 1), (2, 2)]
    assert cli.main(["tree", str(run_dir), "--update", "2", "--html", str(page)]) == 0
    [(update, trees)] = _embedded(page)
    assert update == 2
    assert ["".join(node["tokens"]) for node in trees[1]["nodes"]] == ["", "answer ada", "answer bob"]
    assert [node["credit"] for node in trees[1]["nodes"]] == [None, 0.5, -0.5]


def _embedded(page: Path) -> list[tuple[int, list[dict[str, Any]]]]:
    """(update, trees) as a page holds them."""
    data = re.search(r'<script type="application/json" id="data">(.*?)</script>', page.read_text(), re.DOTALL)
    assert data is not None
    return [(entry["update"], entry["trees"]) for entry in json.loads(data[1])["updates"]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--update", "7"], "no trees of update 7 were kept (updates with trees: 1, 2)"),
        (["--index", "2"], "--index 2: there are 2 trees, from 0"),
    ],
)
def test_what_is_not_there_is_named(
    run_dir: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert cli.main(["tree", str(run_dir), *arguments]) == 2
    assert message in capsys.readouterr().err
    assert cli.main(["tree", str(run_dir / "nowhere"), *arguments]) == 2
    assert "there is no run" in capsys.readouterr().err


def test_a_reader_that_has_seen_enough_is_no_error(run_dir):
    shown = subprocess.Popen(
        command("tree", str(run_dir), "--list"), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert shown.stdout is not None
    shown.stdout.close()
    assert shown.wait(60) == 128 + signal.SIGPIPE
    assert shown.stderr is not None
    assert "Traceback" not in shown.stderr.read()
