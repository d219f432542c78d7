"""How long a weight update keeps a generator from decoding, by engine, path and model size.

    python -m scripts.bench.weight_sync --engines torch,sglang,vllm --paths memory,disk,collective --millions 1,20,100
    python -m scripts.bench.weight_sync --delta --millions 5

For each it prints the median seconds of an update (checksum on both ends, load, flush, read back) and the bytes that
travel, next to what moving the same bytes costs by itself: one checksum pass, one write into shared memory.

Should only what changed travel? `--delta` measures it (engine.weight_delta): after one AdamW step on float32 masters,
the bytes of the whole in the policy's dtype and of what is sent, the seconds in which the sender finds the delta, and
the seconds in which a generator has the new weights from the whole (its own copy included) and from the delta. In
bfloat16 at a learning rate of 1e-6 nearly all elements stay as they are, since a step is far below half a unit in their
last place. A delta saves bytes, which count between nodes; the engine loads and checks the whole model in either case.
"""

import argparse
import asyncio
import math
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import Qwen3Config, Qwen3ForCausalLM

from actors.generators.generator import GeneratorActor
from trace_async.config import ConfigError, EngineConfig, load_config
from trace_async.engines import make_engine
from trace_async.weight_delta import DeltaEncoder
from trace_async.weights import WeightBucket, WeightCount, WeightUpdate, host_bucket, pack_weights

VOCAB_SIZE = 8192
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, slots=True)
class Case:
    engine: str
    path: str
    dtype: str


def make_model(millions: float, dtype: str, folder: Path) -> dict[str, torch.Tensor]:
    """Save a random Qwen3 of about that many parameters. Returns its weights by name."""
    num_layers, head_dim = 4, 64
    # Parameters of a layer are about 12 h² with intermediate 3 h, and the tied embedding has 8192 h.
    hidden = next(h for h in range(64, 8192, 64) if num_layers * 12 * h * h + VOCAB_SIZE * h >= millions * 1e6)
    heads = hidden // head_dim
    model = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=VOCAB_SIZE,
            hidden_size=hidden,
            intermediate_size=3 * hidden,
            num_hidden_layers=num_layers,
            num_attention_heads=heads,
            num_key_value_heads=heads,
            head_dim=head_dim,
            tie_word_embeddings=True,
        )
    ).to(DTYPES[dtype])
    model.save_pretrained(folder)
    return {name: tensor for name, tensor in model.state_dict().items() if name != "lm_head.weight"}


def changed(state: dict[str, torch.Tensor], version: int) -> WeightUpdate:
    return pack_weights({name: tensor * (1 + 0.01 * version) for name, tensor in state.items()}, version)


async def time_updates(case: Case, folder: Path, state: dict[str, torch.Tensor], num: int, threads: int) -> float:
    """Median seconds of an update, the first one (which joins process groups and warms up) not counted."""
    config = EngineConfig(
        backend=case.engine,
        weight_sync=case.path,  # type: ignore[arg-type]
        dtype=case.dtype,  # type: ignore[arg-type]
        kv_cache_tokens=4096,
        num_threads=threads,
        request_timeout_s=600,
    )
    engine = make_engine(config, policy_path=folder, max_context_tokens=512, seed=0, log_dir=folder / "logs")
    await engine.start()
    seconds = []
    try:
        for version in range(1, num + 2):
            update = changed(state, version)
            started = time.perf_counter()
            await engine.update_weights(update)
            seconds.append(time.perf_counter() - started)
    finally:
        await engine.close()
    return statistics.median(seconds[1:])


def time_parts(state: dict[str, torch.Tensor]) -> tuple[float, float]:
    """Return seconds of one checksum pass over the weights and of one write into shared memory."""
    started = time.perf_counter()
    pack_weights(state, 0)
    checksum_s = time.perf_counter() - started
    root = Path("/dev/shm") if Path("/dev/shm").is_dir() else None
    with tempfile.TemporaryDirectory(dir=root) as folder:
        started = time.perf_counter()
        save_file(state, Path(folder) / "model.safetensors")
        return checksum_s, time.perf_counter() - started


class Steps:
    """A policy of float32 masters that AdamW trains on random gradients, and its copy in the dtype that travels."""

    def __init__(self, state: dict[str, torch.Tensor], dtype: str, learning_rate: float) -> None:
        torch.manual_seed(0)
        self.dtype, self.learning_rate = dtype, learning_rate
        self.masters = {name: torch.nn.Parameter(tensor.float().clone()) for name, tensor in state.items()}
        self.optimizer = torch.optim.AdamW(self.masters.values(), lr=learning_rate, weight_decay=0.0)

    def bucket(self) -> WeightBucket:
        """Return the weights as they travel, in memory of their own."""
        return host_bucket({n: m.detach().to(DTYPES[self.dtype], copy=True) for n, m in self.masters.items()})

    def step(self) -> None:
        for master in self.masters.values():
            master.grad = torch.randn_like(master)
        self.optimizer.step()


async def time_delta(folder: Path, steps: Steps, num: int) -> str:
    """A line of the table: medians of `num` updates of a generator with the embedded engine, after a first one."""
    generator = GeneratorActor(
        load_config(None, ["engine.weight_delta=true", f"engine.dtype={steps.dtype}", "engine.kv_cache_tokens=4096"]),
        str(folder),
        0,
        str(folder / "logs"),
    )
    await generator.start()
    encoder = DeltaEncoder()
    rows: list[tuple[float, ...]] = []
    for version in range(1, num + 2):
        steps.step()
        bucket = steps.bucket()
        count = WeightCount()
        count.add(bucket)
        manifest = count.manifest(version)
        started = time.perf_counter()
        encoder.add(bucket)
        delta = encoder.finish(version)
        found_s = time.perf_counter() - started
        by_delta_s = math.nan
        if delta is not None:
            started = time.perf_counter()
            await generator.receive_delta(delta, manifest)
            by_delta_s = time.perf_counter() - started
        started = time.perf_counter()
        # The whole once more where a delta came before: the engine checks and loads it all the same.
        await generator.receive_weights(bucket, manifest)
        whole_s = time.perf_counter() - started
        sent = delta.num_bytes if delta is not None else manifest.num_bytes
        rows.append((manifest.num_bytes / 1e6, sent / 1e6, found_s, whole_s, by_delta_s))
    await generator.close()
    medians = [statistics.median(column) for column in zip(*rows[1:], strict=True)]
    whole_mb, sent_mb, found_s, whole_s, by_delta_s = medians
    return (
        f"{steps.dtype:<10}{steps.learning_rate:>8g}{whole_mb:>10.2f}{sent_mb:>10.3f}{found_s:>9.4f}{whole_s:>9.4f}"
        f"{by_delta_s:>9.4f}"
    )


async def run_deltas(args: argparse.Namespace) -> None:
    print(f"{'dtype':<10}{'rate':>8}{'whole MB':>10}{'sent MB':>10}{'find s':>9}{'whole s':>9}{'delta s':>9}")
    for millions in args.millions:
        for dtype in DTYPES:
            with tempfile.TemporaryDirectory() as folder:
                state = make_model(millions, dtype, Path(folder))
                for learning_rate in (1e-6, 1e-5, 5e-4):
                    steps = Steps(state, dtype, learning_rate)
                    print(await time_delta(Path(folder), steps, args.updates), flush=True)


async def run(args: argparse.Namespace) -> None:
    header = f"{'engine':<8}{'path':<12}{'dtype':<10}{'M params':>9}{'MB':>9}{'update s':>10}{'GB/s':>7}"
    print(f"{header}{'checksum s':>12}{'write s':>9}")
    for millions in args.millions:
        with tempfile.TemporaryDirectory() as folder:
            state = make_model(millions, args.dtype, Path(folder))
            num_bytes = sum(tensor.nbytes for tensor in state.values())
            checksum_s, write_s = time_parts(state)
            for name in args.engines:
                for path in ["memory"] if name == "torch" else args.paths:
                    case = Case(name, path, args.dtype)
                    try:
                        seconds = await time_updates(case, Path(folder), state, args.updates, args.threads)
                    except ConfigError as error:
                        print(f"{name:<8}{path:<12}{error}")
                        continue
                    size = sum(tensor.numel() for tensor in state.values()) / 1e6
                    print(
                        f"{name:<8}{path:<12}{args.dtype:<10}{size:>9.1f}{num_bytes / 1e6:>9.1f}{seconds:>10.3f}"
                        f"{num_bytes / seconds / 1e9:>7.2f}{checksum_s:>12.3f}{write_s:>9.3f}",
                        flush=True,
                    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engines", type=lambda text: text.split(","), default=["torch", "sglang", "vllm"])
    parser.add_argument("--paths", type=lambda text: text.split(","), default=["memory", "disk", "collective"])
    parser.add_argument("--millions", type=lambda text: [float(x) for x in text.split(",")], default=[1.0, 20.0, 100.0])
    parser.add_argument("--dtype", choices=list(DTYPES), default="float32")
    parser.add_argument("--updates", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--delta", action="store_true", help="what sending only the changed elements saves")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    asyncio.run(run_deltas(args) if args.delta else run(args))


if __name__ == "__main__":
    main()
