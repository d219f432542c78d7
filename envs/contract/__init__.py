"""Whether an environment keeps the contract of `trace_async/env.py`: it is played in many ways and judged in words."""
