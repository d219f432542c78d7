"""Demonstrations of the generated questions, imperfect on purpose, to warm-start a small policy.

Random errors leave greedy decoding nearly perfect; systematic ones (more often made than not, in a situation that the
policy can recognise) are made by greedy decoding too, and are what RL then has to unlearn.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from random import Random

from envs.multihop.world import Question, World


@dataclass(frozen=True, slots=True, kw_only=True)
class ErrorRates:
    """Probabilities of errors, each where it can occur.

    `careful`: share of demonstrations without any error. In the others: `half_name`: a person is searched by first
    name only. `half_film`: a film by its first word. `producer`: "producer" is read as "director". `early_answer`:
    after two hops of a longer chain the answer is given. `wrong_relation`: some other relation is read.
    `wasted_search`: a search of something else comes first.
    """

    careful: float = 0.0
    half_name: float = 0.0
    half_film: float = 0.0
    producer: float = 0.0
    early_answer: float = 0.0
    wrong_relation: float = 0.0
    wasted_search: float = 0.0

    @classmethod
    def named(cls, errors: "str | Mapping[str, float]") -> "ErrorRates":
        """Return the rates called `systematic`, `random` or `none`, or own rates, which are given by name."""
        if isinstance(errors, str):
            if errors not in _NAMED:
                raise ValueError(f"env.args.errors={errors}: name one of {', '.join(_NAMED)} or give rates")
            return _NAMED[errors]
        names = [field.name for field in fields(cls)]
        for name, rate in errors.items():
            if name not in names:
                raise ValueError(f"env.args.errors.{name}: unknown; the rates are {', '.join(names)}")
            if not 0 <= rate <= 1:
                raise ValueError(f"env.args.errors.{name}={rate}: must be in [0, 1]")
        return cls(**errors)


_NAMED = {
    "systematic": ErrorRates(careful=0.15, half_name=0.7, producer=0.65, early_answer=0.55),
    "random": ErrorRates(half_name=0.2, half_film=0.2, wrong_relation=0.12, early_answer=0.06, wasted_search=0.06),
    "none": ErrorRates(),
}


def demonstrate(world: World, question: Question, max_turns: int, rates: ErrorRates, rng: Random) -> list[str]:
    """Return the turns of one demonstration, ending in an answer within `max_turns`."""
    if rng.random() < rates.careful:
        rates = _NAMED["none"]
    demo = _Demonstration(world, rates, rng, max_searches=max_turns - 1)
    if question.kind == "middle-older":
        return demo.older(question)
    if question.kind == "middle-country":
        return demo.same_country(question)
    return demo.chain(question)


class _Demonstration:
    def __init__(self, world: World, rates: ErrorRates, rng: Random, max_searches: int) -> None:
        self.world, self.rates, self.rng = world, rates, rng
        self.max_searches = max_searches
        self.turns: list[str] = []

    def chain(self, question: Question) -> list[str]:
        current = question.entities[0]
        for hop, relation in enumerate(question.relations):
            if len(self.turns) >= self.max_searches:
                break
            if hop == 2 and self._errs("early_answer"):
                break
            current = self._look_up(relation, current)
        return self._answer(current, current)

    def older(self, question: Question) -> list[str]:
        left, right = question.entities
        years = [self._look_up("year", film) for film in question.entities]
        return self._answer(" ".join(years), left if years[0] < years[1] else right)

    def same_country(self, question: Question) -> list[str]:
        countries = []
        for person in question.entities:
            countries.append(self._look_up("country", self._look_up("birthplace", person)))
        return self._answer(" ".join(countries), "yes" if countries[0] == countries[1] else "no")

    def _look_up(self, relation: str, entity: str) -> str:
        """Search `entity` and read `relation` from what is found; with errors as the rates say."""
        if relation == "producer" and self._errs("producer"):
            relation = "director"
        if len(self.turns) + 1 < self.max_searches and self._errs("wasted_search"):
            self._search(relation, entity, self.rng.choice(list(self.world.facts)))
        query = entity
        kind = self.world.types.get(entity)
        if (kind == "person" and self._errs("half_name")) or (kind == "film" and self._errs("half_film")):
            query = entity.split()[0]
        facts = self._search(relation, entity, query)
        if self._errs("wrong_relation"):
            return self.rng.choice(list(facts.values()))
        return facts.get(relation) or self.rng.choice(list(facts.values()))

    def _search(self, relation: str, entity: str, query: str) -> Mapping[str, str]:
        self.turns.append(f"need {relation} of {entity} ; search [ {query} ]")
        found = self.world.retriever.search_now(query, top_k=1)
        return self.world.facts[found[0].title]

    def _answer(self, found: str, answer: str) -> list[str]:
        return [*self.turns, f"found {found} ; answer [ {answer} ]"]

    def _errs(self, name: str) -> bool:
        rate: float = getattr(self.rates, name)
        return rate > 0 and self.rng.random() < rate
