"""How much of a tree's shared tokens the learner saves, and what memory it takes.

    python -m scripts.bench.learner             time: flat against packed, per shape of tree
    python -m scripts.bench.learner --memory    peak memory and tokens/s: plain, chunked, packed, checkpointed

Time is one forward, loss and backward over the same trees (no Ray, no DeepSpeed, no optimizer step); on the CPU that
of one thread's own work, so that a busy machine matters less. Flat and packed take turns within one run; quote ratios.
On CUDA the model is Qwen3-0.6B in shape and bf16; on the CPU a small Qwen3 in fp32. Weights are random.
It needs torch, transformers and pydantic alone, so that it also runs on a borrowed GPU machine without the rest.
"""

import argparse
import multiprocessing
import random
import resource
import statistics
import time
from dataclasses import dataclass, replace

import numpy as np
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from trace_async.config import LossConfig
from trace_async.learner.learner import TokenLogprobs
from trace_async.learner.loss import LossTerms, policy_loss
from trace_async.method.aggregation import normalize_credits
from trace_async.method.credit import NodeCredit
from trace_async.packing.attention import attention_for, prepare_model
from trace_async.packing.layout import PackedBatch, Packing, pack_all
from trace_async.policy.device import resolve_device
from trace_async.trees.tree import Node, Rollout, RolloutKind, RolloutTree
from trace_async.types import Task, VersionSpan

# Peak dense bf16 FLOP/s by a part of the device's name, for MFU.
PEAK_FLOPS = {"H200": 989e12, "H100": 989e12, "A100": 312e12}


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """A batch of random trees: `branches` continuations per root rollout, each from a random turn to the full depth.

    The policy wrote half of each turn's tokens.
    """

    trees: int
    prompt_tokens: int
    roots: int
    turns: int
    turn_tokens: int
    branches: int


SHAPES = {
    "quickstart": Shape(trees=12, prompt_tokens=40, roots=3, turns=4, turn_tokens=20, branches=2),
    "root-heavy": Shape(trees=1, prompt_tokens=800, roots=8, turns=3, turn_tokens=40, branches=1),
    "deep": Shape(trees=1, prompt_tokens=200, roots=3, turns=12, turn_tokens=40, branches=4),
    "wide": Shape(trees=1, prompt_tokens=200, roots=16, turns=4, turn_tokens=40, branches=2),
    "no branches": Shape(trees=2, prompt_tokens=200, roots=8, turns=4, turn_tokens=40, branches=0),
}

# Name → (hidden, layers, heads, kv heads, head width, MLP, vocabulary).
MODELS = {
    "0.6M": (128, 3, 4, 2, 32, 384, 512),
    "5M": (256, 6, 8, 4, 32, 768, 512),
    "20M": (256, 6, 8, 4, 32, 768, 32768),
    "135M": (576, 30, 9, 3, 64, 1536, 49152),  # SmolLM2's sizes
    "0.6B": (1024, 28, 16, 8, 128, 3072, 151936),
    "4B": (2560, 36, 32, 8, 128, 9728, 151936),
}


def make_trees(shape: Shape, vocab: int, seed: int) -> list[RolloutTree]:
    rng = random.Random(seed)
    return [_make_tree(shape, vocab, rng) for _ in range(shape.trees)]


def _make_tree(shape: Shape, vocab: int, rng: random.Random) -> RolloutTree:
    def tokens(count: int) -> tuple[int, ...]:
        return tuple(rng.randrange(vocab) for _ in range(count))

    nodes = [Node(parent=-1, rollout=-1, token_ids=tokens(shape.prompt_tokens), num_generated=0)]
    rollouts: list[Rollout] = []

    def write(kind: RolloutKind, anchor: int, turns: int) -> int:
        """Returns the first node written."""
        parent, first = anchor, len(nodes)
        for _ in range(turns):
            length = max(2, round(shape.turn_tokens * rng.uniform(0.7, 1.3)))
            nodes.append(
                Node(
                    parent=parent,
                    rollout=len(rollouts),
                    token_ids=tokens(length),
                    num_generated=length // 2,
                    logprobs=(-6.0,) * (length // 2),
                    version_spans=(VersionSpan(0, 0),),
                )
            )
            parent = len(nodes) - 1
        rollouts.append(Rollout(kind=kind, anchor=anchor, leaf=parent, reward=float(rng.random() < 0.5)))
        return first

    for _ in range(shape.roots):
        first = write("root", 0, shape.turns)
        for _ in range(shape.branches):
            turn = rng.randrange(shape.turns - 1)
            write("continuation", first + turn, shape.turns - 1 - turn)
    task = Task(id="bench", domain="bench", kind="bench", data={})
    return RolloutTree(task=task, nodes=tuple(nodes), rollouts=tuple(rollouts))


def make_batches(trees: list[RolloutTree], packing: Packing, max_tokens: int) -> list[PackedBatch]:
    ones = [np.ones(len(tree.nodes)) for tree in trees]
    credits = normalize_credits(trees, [NodeCredit(positive=w, negative=0 * w, weight=w) for w in ones], "token")
    return pack_all(trees, credits, packing=packing, max_tokens=max_tokens)


class Bench:
    """A random model, and passes (forward, loss, backward) over batches with it."""

    def __init__(self, model: str, device: torch.device, *, chunk_tokens: int, checkpointing: bool = False) -> None:
        hidden, layers, heads, kv_heads, width, mlp, self.vocab = MODELS[model]
        torch.manual_seed(0)
        config = Qwen3Config(
            vocab_size=self.vocab,
            hidden_size=hidden,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            head_dim=width,
            intermediate_size=mlp,
            tie_word_embeddings=True,
        )
        self.device = device
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        self.policy = Qwen3ForCausalLM(config).to(device, dtype).train()
        if checkpointing:
            self.policy.gradient_checkpointing_enable({"use_reentrant": False})
        self.chunk_tokens = chunk_tokens
        self.num_parameters = sum(parameter.numel() for parameter in self.policy.parameters())
        self.attention_width = layers * heads * width

    def flops(self, batches: list[PackedBatch]) -> float:
        """Of a forward and a backward: 6 a parameter and token that it is applied to (the head: the entries, the
        embedding, tied to it: none), 12 a channel and pair of tokens that attends. What is computed again in the
        backward does not count.

        Late tokens attend to more, and packing saves no entry: the FLOP saved are fewer than the tokens saved.
        """
        head = self.policy.get_output_embeddings().weight.numel()
        tokens = sum(batch.layout.num_tokens for batch in batches)
        entries = sum(batch.entries.count for batch in batches)
        pairs = sum(int(batch.layout.positions.sum()) + batch.layout.num_tokens for batch in batches)
        return 6.0 * ((self.num_parameters - head) * tokens + head * entries) + 12.0 * self.attention_width * pairs

    def run(self, batches: list[PackedBatch], packing: Packing) -> float:
        """Return seconds of one pass (CPU: of this process's work)."""
        kind = attention_for(self.device, flat=packing == "flat")
        prepare_model(self.policy, kind)
        module = TokenLogprobs(self.policy, kind, temperature=1.0, chunk_tokens=self.chunk_tokens, entropy=False)
        started = self.now()
        for batch in batches:
            batch = batch.to(self.device)
            logprobs, _ = module(batch)
            loss, _ = policy_loss(batch.entries, LossTerms(learner_logprobs=logprobs), LossConfig())
            loss.backward()
        self.policy.zero_grad()
        return self.now() - started

    def now(self) -> float:
        """Seconds of a clock: on the CPU of this process's work, on CUDA of the wall, once the device has ended."""
        if self.device.type == "cpu":
            return time.process_time()
        torch.cuda.synchronize(self.device)
        return time.perf_counter()


def time_shapes(names: list[str], model: str, device: torch.device, max_tokens: int, repeats: int) -> None:
    bench = Bench(model, device, chunk_tokens=4096)
    print(f"{model} ({bench.num_parameters / 1e6:.1f} M parameters) on {device}, {max_tokens} tokens a micro-batch")
    print(
        "| shape | unique tokens | tokens flat ÷ packed | FLOP | time | time ÷ tokens | time ÷ FLOP | tokens/s | MFU |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    for name in names:
        shape = SHAPES[name]
        if device.type == "cuda":
            shape = replace(shape, trees=8 * shape.trees)
        trees = make_trees(shape, bench.vocab, seed=0)
        flat, packed = (make_batches(trees, packing, max_tokens) for packing in ("flat", "tree"))
        tokens = [sum(batch.layout.num_tokens for batch in batches) for batches in (flat, packed)]
        bench.run(flat, "flat"), bench.run(packed, "tree")
        pairs = [(bench.run(flat, "flat"), bench.run(packed, "tree")) for _ in range(repeats)]
        speedup = statistics.median(a / b for a, b in pairs)
        fastest = min(b for _, b in pairs)
        ideal = tokens[0] / tokens[1]
        least = bench.flops(flat) / bench.flops(packed)
        print(
            f"| {name} | {tokens[1]} | {ideal:.2f} | {least:.2f} | {speedup:.2f} | {speedup / ideal:.0%} | "
            f"{speedup / least:.0%} | {tokens[1] / fastest:.0f} | {mfu(bench, bench.flops(packed), fastest)} |",
            flush=True,
        )


def mfu(bench: Bench, flops: float, seconds: float) -> str:
    """Model FLOP utilisation; '–' where no peak is known."""
    if bench.device.type != "cuda":
        return "–"
    device_name = torch.cuda.get_device_name(bench.device)
    peak = next((flops for part, flops in PEAK_FLOPS.items() if part in device_name), None)
    return f"{flops / seconds / peak:.1%}" if peak else "–"


VARIANTS: dict[str, tuple[Packing, int, bool]] = {
    "plain": ("flat", 10**9, False),
    "chunked": ("flat", 512, False),
    "packed, not chunked": ("tree", 10**9, False),
    "packed, chunked": ("tree", 512, False),
    "packed, chunked, checkpointed": ("tree", 512, True),
}


def memory_of(variant: str, model: str, device_name: str, max_tokens: int) -> tuple[float, float]:
    """(peak megabytes above the model and its gradients, trees' unique tokens per second); in a process of its own."""
    torch.set_num_threads(1)
    device = torch.device(device_name)
    packing, chunk_tokens, checkpointing = VARIANTS[variant]
    bench = Bench(model, device, chunk_tokens=chunk_tokens, checkpointing=checkpointing)
    trees = make_trees(SHAPES["wide"], bench.vocab, seed=0)
    batches = make_batches(trees, packing, max_tokens)
    unique = sum(batch.layout.num_tokens for batch in make_batches(trees, "tree", max_tokens))
    for parameter in bench.policy.parameters():
        parameter.grad = torch.zeros_like(parameter)
    before = _peak_megabytes(device)
    seconds = bench.run(batches, packing)
    return _peak_megabytes(device) - before, unique / seconds


def _peak_megabytes(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure_memory(model: str, device: torch.device, max_tokens: int) -> None:
    print(f"{model} on {device}, shape wide, {max_tokens} tokens a micro-batch")
    print("| variant | peak beyond weights and gradients, MB | unique tokens/s |")
    print("|---|---|---|")
    for variant in VARIANTS:
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            megabytes, speed = pool.apply(memory_of, (variant, model, str(device), max_tokens))
        print(f"| {variant} | {megabytes:.0f} | {speed:.0f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--memory", action="store_true", help="measure memory instead of time")
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=list(SHAPES), help="default: all")
    parser.add_argument("--model", choices=sorted(MODELS), help="default: 0.6B on CUDA; 0.6M (memory: 20M) on the CPU")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--max-tokens", type=int, default=8192, help="tokens of a micro-batch")
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    device = resolve_device(arguments.device, name="--device")
    small = "20M" if arguments.memory else "0.6M"
    model = arguments.model or ("0.6B" if device.type == "cuda" else small)
    if arguments.memory:
        measure_memory(model, device, arguments.max_tokens)
    else:
        time_shapes(arguments.shapes, model, device, arguments.max_tokens, arguments.repeats)


if __name__ == "__main__":
    main()
