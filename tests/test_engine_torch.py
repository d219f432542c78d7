"""The embedded engine: the conformance suite, and what only it promises."""

from typing import ClassVar

from tests.engine_conformance import EngineConformance


class TestTorch(EngineConformance):
    backend = "torch"


class TestTorchWithoutRoom(EngineConformance):
    """Few rows and a pool that never holds a whole request: everything waits, moves and is evicted."""

    backend = "torch"
    settings: ClassVar = {"max_running_requests": 5, "kv_cache_tokens": 700}
