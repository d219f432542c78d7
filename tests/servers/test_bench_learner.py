"""The benchmark of the learner on a machine that has torch and transformers and nothing else of ours."""

import subprocess
import sys

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
