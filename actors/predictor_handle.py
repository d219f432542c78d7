"""Predictor: the answering PredictorActors as the prompts see them."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from ray.actor import ActorHandle

from actors.calls import ask
from trace_async.types import PrefixQuery


@dataclass(frozen=True, slots=True)
class Predictor:
    """Can be sent to other actors; its actors keep their handles when Ray starts them anew."""

    actors: tuple[ActorHandle, ...]
    limit_s: float
    """For a call, a restart of the process included."""

    async def values(self, queries: Sequence[PrefixQuery]) -> Sequence[np.ndarray]:
        """V at each position of each query (see `ValuePredictor.predict`); one actor answers the whole call.

        Raises ActorLostError or CallTimeoutError when no answer can be had.
        """
        if not queries:
            return []
        number = hash(queries[0].token_ids) % len(self.actors)
        reply = self.actors[number].values.remote(list(queries))
        return await ask(reply, who=f"predictor {number}", limit_s=self.limit_s)
