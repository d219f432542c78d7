"""The benchmarks of the learner: where torch and transformers are and nothing else of ours, and a plain loop's rows."""

import subprocess
import sys

import torch

from scripts.bench.learner import SHAPES, Bench, make_trees
from scripts.bench.peers.plain_loop import IGNORED, make_padded

ABSENT = ("ray", "deepspeed", "omegaconf", "mlflow", "peft", "bm25s", "httpx", "hypothesis")
SCRIPT = f"""
import runpy, sys
sys.modules.update(dict.fromkeys({ABSENT}))
sys.argv = ["bench_learner", "--shapes", "deep", "--repeats", "1", "--device", "cpu"]
runpy.run_module("scripts.bench.learner", run_name="__main__")
"""


def test_it_runs_with_torch_and_transformers_alone():
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    *_, row = done.stdout.splitlines()
    name, unique_tokens, tokens, flop, time, *_ = (cell.strip() for cell in row.strip("|").split("|"))
    assert (name, unique_tokens, tokens) == ("deep", "4790", "2.02")
    assert 1 < float(flop) < float(tokens)
    assert float(time) > 0


def test_the_plain_loop_trains_what_the_policy_wrote_in_every_rollout():
    trees = make_trees(SHAPES["quickstart"], 512, seed=0)
    batches = make_padded(trees, 1000)
    paths = [[tree.nodes[index] for index in path] for tree in trees for _, path in tree.branches()]
    written = [token for path in paths for n in path[1:] for token in n.token_ids[-n.num_generated :]]
    labels = torch.cat([labels.flatten() for _, _, labels in batches])
    assert sorted(labels[labels != IGNORED].tolist()) == sorted(written)
    assert sum(int(mask.sum()) for _, mask, _ in batches) == sum(len(n.token_ids) for path in paths for n in path)
    assert all(ids.numel() <= 1000 for ids, _, _ in batches)


def test_the_plain_loop_computes_each_row_as_if_it_were_alone():
    """What is padded must not reach what is not."""
    trees = make_trees(SHAPES["quickstart"], 512, seed=0)[:1]
    bench = Bench("0.6M", torch.device("cpu"), chunk_tokens=100)
    (together,) = make_padded(trees, 10**6)
    ids, mask, labels = together
    logits = bench.policy(input_ids=ids, attention_mask=mask).logits
    for row in range(len(ids)):
        length = int(mask[row].sum())
        alone = bench.policy(input_ids=ids[row : row + 1, :length]).logits[0]
        torch.testing.assert_close(logits[row, :length], alone, atol=1e-4, rtol=1e-4)
        assert (labels[row, length:] == IGNORED).all()
