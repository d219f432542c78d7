"""The learner's forward and backward against a plain Hugging Face training loop, over the same rollouts.

    python -m scripts.bench.peers.plain_loop --model 135M --shapes quickstart deep --max-tokens 1024 --repeats 3

The plain loop is what a user would write: every rollout a row, rows of like length padded together, transformers' own
attention (SDPA), all logits, the model's own loss on the tokens that the policy wrote. Ours computes the policy loss,
once with the rollouts side by side (flat) and once as trees (packed); either way a token that several rollouts share
passes the head once. No optimizer step. The three take turns in one process; quote ratios. Times are as in
scripts.bench.learner.
"""

import argparse
import statistics

import torch

from scripts.bench.learner import MODELS, SHAPES, Bench, make_batches, make_trees
from trace_async.policy.device import resolve_device
from trace_async.trees.tree import RolloutTree

IGNORED = -100
"""The label that transformers' loss leaves out."""

# Token ids, mask and labels, each [rows, T].
PaddedBatch = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def make_padded(trees: list[RolloutTree], max_tokens: int) -> list[PaddedBatch]:
    """Return all rollouts, shortest first, with as many rows in a batch as fit into `max_tokens`, padding included."""
    rows = sorted((_row(tree, path) for tree in trees for _, path in tree.branches()), key=lambda row: len(row[0]))
    batches, begin = [], 0
    for end in range(1, len(rows) + 1):
        if end == len(rows) or (end + 1 - begin) * len(rows[end][0]) > max_tokens:
            batches.append(_padded(rows[begin:end]))
            begin = end
    return batches


def _row(tree: RolloutTree, path: tuple[int, ...]) -> tuple[list[int], list[int]]:
    """Ids and labels of one rollout."""
    ids: list[int] = []
    labels: list[int] = []
    for node in (tree.nodes[index] for index in path):
        given = len(node.token_ids) - node.num_generated
        ids += node.token_ids
        labels += [IGNORED] * given + list(node.token_ids[given:])
    return ids, labels


def _padded(rows: list[tuple[list[int], list[int]]]) -> PaddedBatch:
    ids, labels = (
        torch.nn.utils.rnn.pad_sequence([torch.tensor(row[part]) for row in rows], True, filler)
        for part, filler in ((0, 0), (1, IGNORED))
    )
    mask = torch.zeros_like(ids)
    for place, (row, _) in enumerate(rows):
        mask[place, : len(row)] = 1
    return ids, mask, labels


def run_plain(bench: Bench, batches: list[PaddedBatch]) -> float:
    """Return seconds of one pass of the plain loop."""
    bench.policy.set_attn_implementation("sdpa")
    started = bench.now()
    for batch in batches:
        ids, mask, labels = (part.to(bench.device) for part in batch)
        bench.policy(input_ids=ids, attention_mask=mask, labels=labels, use_cache=False).loss.backward()
    bench.policy.zero_grad()
    return bench.now() - started


def compare(name: str, bench: Bench, max_tokens: int, repeats: int) -> str:
    """One line of the table."""
    trees = make_trees(SHAPES[name], bench.vocab, seed=0)
    padded = make_padded(trees, max_tokens)
    flat, packed = (make_batches(trees, packing, max_tokens) for packing in ("flat", "tree"))
    tokens, unique = (sum(batch.layout.num_tokens for batch in batches) for batches in (flat, packed))
    times = [(run_plain(bench, padded), bench.run(flat, "flat"), bench.run(packed, "tree")) for _ in range(1 + repeats)]
    del times[0]  # warming up
    plain = statistics.median(plain for plain, _, _ in times)
    by_flat = statistics.median(plain / flat for plain, flat, _ in times)
    by_packed = statistics.median(plain / packed for plain, _, packed in times)
    saved = statistics.median(flat / packed for _, flat, packed in times)
    ideal = bench.flops(flat) / bench.flops(packed)
    return (
        f"| {name} | {tokens} | {unique} | {tokens / plain:.0f} | {by_flat:.2f} | {by_packed:.2f} | "
        f"{saved:.2f} of {ideal:.2f} ({saved / ideal:.0%}) |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=list(SHAPES), help="default: all")
    parser.add_argument("--model", choices=sorted(MODELS), default="0.6M")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--max-tokens", type=int, default=8192, help="tokens of a micro-batch")
    parser.add_argument("--chunk-tokens", type=int, default=1024, help="learner.logprob_chunk_tokens of ours")
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    device = resolve_device(arguments.device, name="--device")
    bench = Bench(arguments.model, device, chunk_tokens=arguments.chunk_tokens)
    print(f"{arguments.model} ({bench.num_parameters / 1e6:.1f} M) on {device}, {arguments.max_tokens} tokens a batch")
    print(
        "| shape | rollouts' tokens | unique | plain, tokens/s | plain ÷ flat | plain ÷ packed | flat ÷ packed, FLOP |"
    )
    print("|---|---|---|---|---|---|---|")
    for name in arguments.shapes:
        print(compare(name, bench, arguments.max_tokens, arguments.repeats), flush=True)


if __name__ == "__main__":
    main()
