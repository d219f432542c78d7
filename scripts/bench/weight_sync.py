"""How long a weight update keeps a generator from decoding, by engine, path and model size.

    python scripts/bench/weight_sync.py --engines torch,sglang,vllm --paths memory,disk,collective --millions 1,20,100

For each it prints the median seconds of an update (checksum on both ends, load, flush, read back) and the bytes that
travel, next to what moving the same bytes costs by itself: one checksum pass, one write into shared memory.

Should only what changed travel? `--unchanged` measures what one AdamW step leaves unchanged, at the policy's dtype.
Whole tensors: none, when all are trained, so leaving out unchanged *tensors* saves nothing; frozen ones (LoRA's
embeddings) would save their share. Single elements: in bfloat16 at a learning rate of 1e-6 nearly all stay as they
are, since a step is far below half a unit in their last place. Sending (index, value) pairs, 6 bytes an element in
place of 2, is then smaller by an order of magnitude, and is worth it where bytes are what costs time: between nodes,
at less than a third of changed elements. On one machine an update is bound by loading and checking, not by the copy
through shared memory, and what the engine loads is the whole model in either case. So here whole models travel.
"""

import argparse
import asyncio
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import Qwen3Config, Qwen3ForCausalLM

from trace_async.config import ConfigError, EngineConfig
from trace_async.engines import make_engine
from trace_async.weights import WeightUpdate, pack_weights

VOCAB_SIZE = 8192
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, slots=True)
class Case:
    engine: str
    path: str
    dtype: str


def make_model(millions: float, dtype: str, folder: Path) -> dict[str, torch.Tensor]:
    """A random Qwen3 of about that many parameters, saved; its weights by name."""
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
        backend=case.engine,  # type: ignore[arg-type]
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
    """Seconds of one checksum pass over the weights and of one write into shared memory."""
    started = time.perf_counter()
    pack_weights(state, 0)
    checksum_s = time.perf_counter() - started
    root = Path("/dev/shm") if Path("/dev/shm").is_dir() else None
    with tempfile.TemporaryDirectory(dir=root) as folder:
        started = time.perf_counter()
        save_file(state, Path(folder) / "model.safetensors")
        return checksum_s, time.perf_counter() - started


def unchanged_shares(dtype: str, learning_rate: float) -> tuple[float, float]:
    """After one AdamW step on fp32 masters: share of tensors and of elements whose copy in `dtype` is the same."""
    torch.manual_seed(0)
    masters = [torch.nn.Parameter(0.02 * torch.randn(512, 512)) for _ in range(8)]
    optimizer = torch.optim.AdamW(masters, lr=learning_rate, weight_decay=0.0)
    before = [master.detach().to(DTYPES[dtype], copy=True) for master in masters]
    for master in masters:
        master.grad = torch.randn_like(master)
    optimizer.step()
    same = [(old == master.detach().to(DTYPES[dtype])) for old, master in zip(before, masters, strict=True)]
    return sum(bool(s.all()) for s in same) / len(same), float(torch.cat([s.flatten() for s in same]).float().mean())


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
    parser.add_argument("--unchanged", action="store_true", help="only measure what a step leaves unchanged")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if not args.unchanged:
        asyncio.run(run(args))
    for dtype in DTYPES:
        for learning_rate in (1e-6, 1e-5, 5e-4):
            tensors, elements = unchanged_shares(dtype, learning_rate)
            shares = f"{tensors:.0%} of tensors, {elements:.1%} of elements"
            print(f"unchanged after an AdamW step, {dtype}, learning rate {learning_rate:g}: {shares}")


if __name__ == "__main__":
    main()
