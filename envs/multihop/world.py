"""Generated knowledge: small worlds of people, films, cities and companies, and questions of one to six hops.

Everything follows from seeds. Names are two words out of small pools, so that half a name finds a similar distractor.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from hashlib import blake2b
from random import Random

from envs.multihop.retrieval import BM25Retriever, Passage
from trace_async.types import Split


def _split(words: str) -> tuple[str, ...]:
    return tuple(words.split())


FIRST_NAMES = _split("ada ben cora dan eva finn gina hugo iris jack kate leo mona nick")
LAST_NAMES = _split("abbot baker cohen dietz ellis fuchs gupta haas ito jones klein lopez meyer novak")
FILM_ADJECTIVES = _split("amber broken crimson distant endless frozen golden hidden iron lonely quiet silver")
FILM_NOUNS = _split("bridge canyon dream empire forest garden harbor island journey mirror river storm")
CITIES = _split(
    "aldor brenna calvia dorne estva farrow gellin hallow irvale jorvik keld lumen marlow norvik orsen pella"
)
COMPANIES = _split(
    "acmex bluefin corvex deltron ecomar fintra gravix helios ionix jupex kronos lyrata maxon nexal omnia pyxis"
)
COUNTRIES = _split("arland borduria carpania drovia elbonia freedonia")
YEARS = tuple(str(year) for year in range(1981, 2001))

RELATIONS: Mapping[str, Mapping[str, str]] = {
    "film": {"director": "person", "producer": "person", "studio": "company", "year": "literal"},
    "person": {"birthplace": "city", "employer": "company", "mentor": "person"},
    "city": {"country": "literal", "mayor": "person"},
    "company": {"seat": "city", "founder": "person"},
}
"""By type of entity: its relations and the type of what they lead to; a literal has no document of its own."""

CHAIN_KINDS: Mapping[str, tuple[int, tuple[str, ...]]] = {
    "easy-1hop": (1, ("city", "company")),
    "middle-1hop": (1, ("film", "person")),
    "middle-2hop": (2, ("film", "person", "company")),
    "middle-3hop": (3, ("film", "person", "company")),
    "middle-4hop": (4, ("film", "person", "company")),
    "hard-5hop": (5, ("film", "person", "company")),
    "hard-6hop": (6, ("film", "person", "company")),
}
"""Kind of question: its hops and the types of entity that it may start from."""
COMPARE_KINDS = ("middle-older", "middle-country")
KINDS = (*CHAIN_KINDS, *COMPARE_KINDS)


@dataclass(frozen=True, slots=True)
class Question:
    """A question about a world."""

    kind: str
    """One of KINDS."""
    text: str
    """As the user asks it."""
    entities: tuple[str, ...]
    """What it names."""
    relations: tuple[str, ...]
    """What has to be looked up from there, in this order."""
    answer: str
    """In words."""


class World:
    """The world number `number` of the worlds of `seed`: facts by entity, one document each, and an index."""

    def __init__(self, seed: int, number: int) -> None:
        self.seed, self.number = seed, number
        rng = Random(f"world/{seed}/{number}")
        self.types: dict[str, str] = {}
        self._add("person", _pairs(FIRST_NAMES, LAST_NAMES, 60, rng))
        self._add("film", _pairs(FILM_ADJECTIVES, FILM_NOUNS, 50, rng))
        self._add("city", CITIES)
        self._add("company", COMPANIES)
        self.by_type = {kind: [e for e, t in self.types.items() if t == kind] for kind in RELATIONS}
        self.facts = {entity: self._facts(entity, rng) for entity in self.types}

    def _add(self, kind: str, names: Sequence[str]) -> None:
        self.types.update(dict.fromkeys(names, kind))

    def _facts(self, entity: str, rng: Random) -> dict[str, str]:
        facts: dict[str, str] = {}
        for relation, target in RELATIONS[self.types[entity]].items():
            if target == "literal":
                facts[relation] = rng.choice(YEARS if relation == "year" else COUNTRIES)
            else:
                taken = {entity, *facts.values()}
                facts[relation] = rng.choice([other for other in self.by_type[target] if other not in taken])
        return facts

    @cached_property
    def passages(self) -> dict[str, Passage]:
        """One line for every entity."""
        return {
            entity: Passage(entity, f"{self.types[entity]} " + " ".join(f"{r} {v}" for r, v in facts.items()))
            for entity, facts in self.facts.items()
        }

    @cached_property
    def retriever(self) -> BM25Retriever:
        return BM25Retriever(list(self.passages.values()))

    def question(self, kind: str, rng: Random, split: Split) -> Question:
        """Return a question of `kind` whose text belongs to `split`."""
        while True:
            question = self._chain(kind, rng) if kind in CHAIN_KINDS else self._comparison(kind, rng)
            if question is not None and split_of(question.text) == split:
                return question

    def _chain(self, kind: str, rng: Random) -> Question | None:
        hops, starts = CHAIN_KINDS[kind]
        start = rng.choice(self.by_type[rng.choice(starts)])
        visited = [start]
        relations: list[str] = []
        while len(relations) < hops:
            entity_type = self.types.get(visited[-1])
            if entity_type is None:
                return None
            relations.append(rng.choice(list(RELATIONS[entity_type])))
            visited.append(self.facts[visited[-1]][relations[-1]])
        if len(set(visited)) < len(visited):
            return None
        # People are the ones with similar names: without one in it, a chain of any length is easy.
        if hops > 1 and not any(self.types[entity] == "person" for entity in visited[:-1]):
            return None
        # Of six countries one is guessed too easily where the chain itself cannot be followed to its end.
        if kind.startswith("hard") and relations[-1] == "country":
            return None
        path = " of ".join(reversed(relations))
        return Question(kind, f"what is {path} of {start} ?", (start,), tuple(relations), visited[-1])

    def _comparison(self, kind: str, rng: Random) -> Question | None:
        if kind == "middle-older":
            left, right = rng.sample(self.by_type["film"], 2)
            years = self.facts[left]["year"], self.facts[right]["year"]
            if years[0] == years[1]:
                return None
            answer = left if years[0] < years[1] else right
            return Question(kind, f"which is older {left} or {right} ?", (left, right), ("year",), answer)
        left, right = rng.sample(self.by_type["person"], 2)
        countries = [self.facts[self.facts[person]["birthplace"]]["country"] for person in (left, right)]
        answer = "yes" if countries[0] == countries[1] else "no"
        # Without this five of six answers would be no.
        if answer == "no" and rng.random() < 0.8:
            return None
        text = f"same country of birthplace of {left} and {right} ?"
        return Question(kind, text, (left, right), ("birthplace", "country"), answer)


def split_of(question_text: str) -> Split:
    """Return the split of a question. A quarter of all texts, by their hash, is only ever asked in held-out worlds."""
    return "heldout" if blake2b(question_text.encode(), digest_size=1).digest()[0] < 64 else "train"


def _pairs(first: Sequence[str], second: Sequence[str], count: int, rng: Random) -> list[str]:
    return rng.sample([f"{a} {b}" for a in first for b in second], count)


def vocabulary() -> list[str]:
    """Return every word of the worlds, their documents and questions."""
    names = [*FIRST_NAMES, *LAST_NAMES, *FILM_ADJECTIVES, *FILM_NOUNS, *CITIES, *COMPANIES, *COUNTRIES, *YEARS]
    relations = [*RELATIONS, *(relation for relations in RELATIONS.values() for relation in relations)]
    return [*names, *relations, *_split("what is of ? which older or same and yes no")]
