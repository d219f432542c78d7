"""The real servers, SGLang and vLLM: the conformance suite, and what can go wrong with a process."""

import os

import pytest

from tests.engine_conformance import EngineConformance
from trace_async.engine import EngineRequestError
from trace_async.engines.server import PROJECT_ROOT

pytestmark = pytest.mark.slow


def needs(backend: str) -> pytest.MarkDecorator:
    """Skips where the engine's environment is missing, except in CI, where that is a failure."""
    missing = not (PROJECT_ROOT / ".venvs" / backend / "bin" / "python").is_file() and os.environ.get("CI") != "true"
    return pytest.mark.skipif(missing, reason=f"no .venvs/{backend}: run `bash scripts/setup_engines.sh {backend}`")


@needs("sglang")
class TestSGLang(EngineConformance):
    backend = "sglang"


@needs("vllm")
class TestVLLM(EngineConformance):
    backend = "vllm"
    cache_granularity = 32
    long_answer = 470

    async def test_top_k_and_top_p_cut_the_tail_and_leave_logprobs_as_they_are(self, harness):
        """vLLM's log-probabilities would be renormalised, so such requests are refused."""
        for params in ({"top_k": 3}, {"top_p": 0.5}):
            with pytest.raises(EngineRequestError, match="top_p=1"):
                await harness.generate(harness.prompt(10), **params)
