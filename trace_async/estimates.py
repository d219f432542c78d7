"""What is believed about each prompt's success: a Beta posterior from the value model and the prompt's own counts."""

from dataclasses import dataclass

from trace_async.marginals import FloatArray


@dataclass(frozen=True, slots=True)
class Estimates:
    """Beta(a_i, b_i) for each candidate prompt; `a` and `b` are [prompts], > 0."""

    a: FloatArray
    b: FloatArray

    def __post_init__(self) -> None:
        if self.a.shape != self.b.shape or self.a.ndim != 1 or not ((self.a > 0) & (self.b > 0)).all():
            raise ValueError("Estimates: a and b must be flat, equally long and > 0")

    @property
    def mean(self) -> FloatArray:
        return self.a / (self.a + self.b)

    @property
    def strength(self) -> FloatArray:
        """Pseudo rollouts behind each mean."""
        return self.a + self.b
