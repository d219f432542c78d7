"""Is a mathematical answer right? Numbers are compared exactly; everything else by `math-verify`, in a process apart.

A model's answer may be a formula on which computer algebra never ends or takes all memory (9^(9^(9^9))), and
math-verify's own time limits need signals, which only a main thread gets. So it runs in a small process of its own,
with bounded memory, that is ended when it takes too long.
"""

import asyncio
import contextlib
import json
import re
import signal
import sys
from fractions import Fraction
from typing import Literal

from trace_async.env import EnvError

AnswerCheck = Literal["math_verify", "numeric"]

_MAX_ANSWER_CHARS = 500
_NUMBER = re.compile(r"[+-]?(\d+(\.\d*)?|\.\d+)(/\d+)?")
_START_TIMEOUT_S = 60.0
_MEMORY_BYTES = 2 * 2**30


def parse_number(text: str) -> Fraction | None:
    """Return the exact value of a plain number (`1,234`, `$5.50`, `3/4`, `12 %` as 12), or None. Never raises."""
    plain = text.strip().removeprefix("$").removesuffix("%").removesuffix(".").replace("\\$", "").strip()
    plain = re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", plain)
    if len(plain) > 100 or not plain.isascii() or not _NUMBER.fullmatch(plain):
        return None
    numerator, _, denominator = plain.partition("/")
    if denominator and int(denominator) == 0:
        return None
    return Fraction(numerator) / int(denominator or 1)


def unbox(text: str) -> str:
    """Return the content of the last `\\boxed{…}`, or the text itself."""
    start = text.rfind("\\boxed{")
    if start < 0:
        return text
    depth = 0
    for position in range(start + 6, len(text)):
        depth += {"{": 1, "}": -1}.get(text[position], 0)
        if depth == 0:
            return text[start + 7 : position]
    return text


def _one_formula(text: str) -> str:
    """Return `text` without what would make it several formulas: math-verify would take any of them for the answer."""
    return " ".join(re.sub(r"\\[()\[\]]|\\boxed|\$", " ", text).split())


class AnswerChecker:
    """Compares answers; `close` ends its process. `cpu_limit_s`: processor time that one comparison may take.

    An answer on which math-verify takes more than that, or more than 2 GB, twice, counts as wrong: the model wrote it.
    That must not hang on how busy the machine is, so the clock on the wall decides nothing. Raises EnvError where
    math-verify cannot be started or gives no verdict for 60 times that long: our failure.
    """

    def __init__(self, check: AnswerCheck = "math_verify", *, cpu_limit_s: float = 10.0) -> None:
        self._check = check
        self._cpu_limit_s = cpu_limit_s
        self._process: asyncio.subprocess.Process | None = None
        self._turn = asyncio.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None

    async def is_right(self, answer: str, gold: str) -> bool:
        answer, gold = _one_formula(unbox(answer)), _one_formula(unbox(gold))
        if len(answer) > _MAX_ANSWER_CHARS or answer.count("{") != answer.count("}"):
            return False
        given, wanted = parse_number(answer), parse_number(gold)
        if given is not None and wanted is not None:
            return given == wanted
        if self._check == "numeric":
            return answer.strip() == gold.strip()
        self._leave_other_loop()
        async with self._turn:
            for _ in range(2):
                verdict = await self._ask({"answer": answer, "gold": gold})
                if verdict is not None:
                    return verdict
        return False

    async def close(self) -> None:
        """End the process; a later comparison starts a new one."""
        process, self._process = self._process, None
        if process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()
        assert process.stdin is not None
        process.stdin.close()

    def _leave_other_loop(self) -> None:
        """A process belongs to the event loop that started it; in another loop begin anew."""
        loop = asyncio.get_running_loop()
        if self._loop is not loop:
            if self._process is not None:
                with contextlib.suppress(ProcessLookupError):
                    self._process.kill()
            self._loop, self._process, self._turn = loop, None, asyncio.Lock()

    async def _ask(self, question: dict[str, str]) -> bool | None:
        """Return the verdict, or None where the process did not survive the question."""
        process = self._process or await self._start()
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(json.dumps(question).encode() + b"\n")
            await process.stdin.drain()
            line = await asyncio.wait_for(process.stdout.readline(), 60 * self._cpu_limit_s)
        except TimeoutError as error:
            await self.close()
            raise EnvError(f"math-verify gives no verdict for {60 * self._cpu_limit_s:g} s") from error
        except OSError:
            line = b""
        except asyncio.CancelledError:
            await self.close()  # a later question must not read this one's verdict
            raise
        if not line:
            await self.close()
            return None
        return bool(json.loads(line))

    async def _start(self) -> asyncio.subprocess.Process:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "envs.math.answers", str(self._cpu_limit_s)),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,
        )
        self._process = process
        assert process.stdout is not None
        try:
            ready = await asyncio.wait_for(process.stdout.readline(), _START_TIMEOUT_S)
        except TimeoutError:
            ready = b""
        if ready != b"ready\n":
            await self.close()
            raise EnvError("math-verify cannot be started; try: python -m envs.math.answers 10 < /dev/null")
        return process


def _serve(cpu_limit_s: float) -> None:
    """One JSON question a line in, one verdict a line out, until the input ends or a question takes too long."""
    import resource

    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_BYTES, _MEMORY_BYTES))
    targets = [LatexExtractionConfig(), ExprExtractionConfig()]
    print("ready", flush=True)
    for line in sys.stdin:
        question = json.loads(line)
        signal.setitimer(signal.ITIMER_PROF, cpu_limit_s)  # its signal ends the process
        gold = parse(f"${question['gold']}$", targets)
        answer = parse(f"${question['answer']}$", targets)
        verdict = bool(gold and answer and verify(gold, answer))
        signal.setitimer(signal.ITIMER_PROF, 0)
        print(json.dumps(verdict), flush=True)


if __name__ == "__main__":
    _serve(float(sys.argv[1]))
