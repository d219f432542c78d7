"""The real servers with a real tokenizer: the conformance suite, as for the embedded engine."""

from typing import Any, ClassVar

import pytest

from tests.conformance.real_tokenizer import WithRealTokenizer
from tests.servers.test_engine_servers import RefusesTruncation, needs

pytestmark = pytest.mark.slow


@needs("sglang")
class TestSGLangWithRealTokenizer(WithRealTokenizer):
    backend = "sglang"
    settings: ClassVar[dict[str, Any]] = {"request_timeout_s": 60.0}


@needs("vllm")
class TestVLLMWithRealTokenizer(RefusesTruncation, WithRealTokenizer):
    backend = "vllm"
    settings: ClassVar[dict[str, Any]] = {"request_timeout_s": 60.0}
    cache_granularity = 32
    long_answer = 470
