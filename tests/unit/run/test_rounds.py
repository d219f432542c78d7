"""The books of a run: cases worked out by hand, then random sequences of events against what must always hold."""

import random
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.run.test_buffer import make_tree
from trace_async.run.rounds import NothingToLearnError, Rounds, RunLimits
from trace_async.run.state import PlannedPrompt
from trace_async.trees.tree import RolloutTree
from trace_async.types import LossKind

MAX_ROLLOUTS = 4


def books(m: int = 8, staleness: int = 1, updates: int = 10, tokens: int = 0) -> Rounds:
    limits = RunLimits(roots_per_update=m, max_staleness=staleness, num_updates=updates, max_generated_tokens=tokens)
    return Rounds(limits, {"position": 0})


def plan(rounds: Rounds, counts: Sequence[int]) -> None:
    number = rounds.state.num_rounds
    prompts = [
        PlannedPrompt(task_id=f"{number}.{i}", num_roots=count, root_value=0.5, seed=i)
        for i, count in enumerate(counts)
    ]
    rounds.add_round(prompts, {"position": number + 1})


def start_all(rounds: Rounds) -> list[int]:
    tickets = []
    while rounds.may_start():
        tickets.append(rounds.start()[0])
    return tickets


def finish(rounds: Rounds, ticket: int, *, lost: int = 0, keep: bool = True) -> None:
    prompt = rounds.pending[ticket]
    tree = make_tree(
        prompt.task_id,
        version=prompt.policy_version,
        num_roots=prompt.num_roots,
        failures={LossKind.ENV: lost} if lost else {},
    )
    rounds.arrive(ticket, tree, keep=keep)


def update(rounds: Rounds, *, updated: bool = True) -> list[RolloutTree]:
    trees = rounds.take()
    rounds.account(trees, updated=updated)
    return trees


def test_prompts_start_one_by_one_as_others_end():
    rounds = books(m=8, staleness=1)
    assert rounds.wants_round()
    plan(rounds, [2, 2, 4, 4, 2, 2])
    # What may be ahead of the learner grows at a time: 8 roots.
    assert start_all(rounds) == [0, 1, 2]
    assert not rounds.wants_round()  # enough of the plan is left
    finish(rounds, 0)
    assert start_all(rounds) == [3]  # 6 grew, 10 do
    finish(rounds, 2)
    assert start_all(rounds) == [4]
    finish(rounds, 1)
    finish(rounds, 3)
    assert rounds.ready()
    assert start_all(rounds) == [5]
    assert not rounds.wants_round()  # 16 roots are outstanding: as many as can be trained in time


def test_no_more_starts_than_can_be_trained_in_time():
    rounds = books(m=8, staleness=1)
    ended = 0
    while rounds.wants_round():
        plan(rounds, [2, 2, 2, 2])
        while start_all(rounds):
            for ticket in list(rounds.pending):
                finish(rounds, ticket)
                ended += 2
    assert ended == 16  # (max_staleness + 1)·M, though nothing grows and the learner has taken nothing
    assert rounds.ready()
    assert len(update(rounds)) == 4
    assert rounds.wants_round()


def test_zero_staleness_starts_a_whole_round_at_once_and_plans_the_next_after_the_update():
    rounds = books(m=8, staleness=0)
    plan(rounds, [4, 2, 2])
    assert len(start_all(rounds)) == 3
    assert not rounds.wants_round()
    for ticket in (0, 1, 2):
        assert not rounds.ready()
        finish(rounds, ticket)
    assert [tree.num_roots_allocated for tree in update(rounds)] == [4, 2, 2]
    assert rounds.wants_round()


def test_lost_and_filtered_roots_are_replaced_so_that_an_update_keeps_its_size():
    rounds = books(m=8, staleness=0)
    plan(rounds, [2, 2, 2, 2])
    start_all(rounds)
    rounds.lose(0, LossKind.TREE_TIMEOUT)
    finish(rounds, 1, lost=1)
    finish(rounds, 2, keep=False)
    finish(rounds, 3)
    assert not rounds.ready()  # 3 of 8 roots can be trained on
    assert rounds.wants_round()
    plan(rounds, [2, 2, 2, 2])
    tickets = start_all(rounds)
    assert len(tickets) == 3  # 3 + 6 ≥ 8; the fourth stays planned
    for ticket in tickets:
        finish(rounds, ticket)
    trees = update(rounds)
    assert sum(len(tree.rollouts) for tree in trees) == 9
    ledger = rounds.state.ledger
    assert ledger.failed == {LossKind.TREE_TIMEOUT: 2, LossKind.ENV: 1}
    assert ledger.filtered == {"root": 2}
    assert ledger.trained == {"root": 9}


def test_the_last_update_takes_everything():
    rounds = books(m=4, staleness=1, updates=2)
    plan(rounds, [4])
    start_all(rounds)
    finish(rounds, 0)
    update(rounds)
    plan(rounds, [3, 3])
    first, second = start_all(rounds)
    finish(rounds, second)
    assert not rounds.ready()
    finish(rounds, first)
    assert len(update(rounds)) == 2  # though six are more than an update of four
    assert rounds.finished()
    assert not rounds.wants_round()


def test_spent_tokens_end_the_run_with_what_is_there():
    rounds = books(m=4, staleness=1, tokens=6)  # a root of `make_tree` has one generated token
    plan(rounds, [4])
    start_all(rounds)
    finish(rounds, 0)
    update(rounds)
    plan(rounds, [2, 2])
    start_all(rounds)
    finish(rounds, 1)
    assert rounds.spent()
    assert not rounds.wants_round()
    assert not rounds.ready()
    finish(rounds, 2)
    assert not rounds.finished()
    assert len(update(rounds)) == 2
    assert rounds.finished()


def test_an_update_without_credit_counts_but_keeps_the_version():
    rounds = books(m=4, staleness=1, updates=30)
    for number in range(1, 21):
        plan(rounds, [4])
        start_all(rounds)
        finish(rounds, number - 1)
        rounds.check_worth("the log")
        update(rounds, updated=False)
        assert (rounds.state.num_updates, rounds.state.policy_version) == (number, 0)
    with pytest.raises(NothingToLearnError, match="in 20 updates in a row no prompt had both outcomes"):
        rounds.check_worth("the log")


def test_updates_that_are_not_finite_count_in_a_row_and_end_the_run_in_words():
    rounds = books(m=4, staleness=1, updates=30)
    for number, finite in enumerate([False] * 4 + [True] + [False] * 5):
        plan(rounds, [4])
        start_all(rounds)
        finish(rounds, number)
        rounds.check_worth("the log")
        rounds.account(rounds.take(), updated=finite, finite=finite)
    assert (rounds.state.policy_version, rounds.state.updates_without_credit) == (1, 0)
    with pytest.raises(NothingToLearnError, match=r"not finite in 5 updates in a row.*learning_rate.*in the log"):
        rounds.check_worth("the log")
    again = books(m=4, staleness=1, updates=30)
    again.restore(rounds.snapshot())
    again.check_worth("the log")


def test_after_a_resume_updates_without_credit_count_anew():
    rounds = books(m=4, staleness=1, updates=30)
    for number in range(20):
        plan(rounds, [4])
        start_all(rounds)
        finish(rounds, number)
        update(rounds, updated=False)
    again = books(m=4, staleness=1, updates=30)
    again.restore(rounds.snapshot())
    again.check_worth("the log")


def test_after_a_resume_nothing_that_failed_before_counts():
    rounds = books(m=8, staleness=1, updates=400)
    for _ in range(256 // 8):  # four losses in five, over many updates
        plan(rounds, [4] * 10)
        for _ in range(2):
            for ticket in start_all(rounds):
                rounds.lose(ticket, LossKind.ENV)
        while not rounds.ready():
            for ticket in start_all(rounds):
                finish(rounds, ticket)
        rounds.check_worth("the log")
        update(rounds)
    assert rounds.state.ledger.failed[LossKind.ENV] >= 4 * 8 * 8
    again = books(m=8, staleness=1, updates=400)
    again.restore(rounds.snapshot())
    again.check_worth("the log")


def lose_rounds(rounds: Rounds, count: int, *, filtered: int, finished: int = 0) -> None:
    """`count` prompts of 4 are lost, `filtered` are filtered out, `finished` are kept, in one update."""
    kinds = ["lost"] * count + ["filtered"] * filtered + ["kept"] * finished
    random.Random(0).shuffle(kinds)
    for kind in kinds:
        if not rounds.planned:
            plan(rounds, [4, 4])
        ticket, _ = rounds.start()
        if kind == "lost":
            rounds.lose(ticket, LossKind.ENV)
        else:
            finish(rounds, ticket, keep=kind == "kept")


def test_a_filter_that_drops_nearly_all_is_no_break_down():
    """DAPO with 95 % filtered and 20 % failing, M = 32: many fail before an update is full, and most of all do not."""
    rounds = books(m=32, staleness=0)
    lose_rounds(rounds, 40, filtered=152, finished=7)
    assert sum(rounds.state.ledger.failed.values()) >= 4 * 32
    rounds.check_worth("the log")


def test_a_run_in_which_nearly_everything_breaks_down_is_ended_in_words():
    rounds = books(m=8, staleness=0)
    lose_rounds(rounds, 7, filtered=0)
    rounds.check_worth("the log")
    lose_rounds(rounds, 1, filtered=0)
    with pytest.raises(NothingToLearnError, match=r"32 failed and 0 finished .*env_error.* The causes are in the log"):
        rounds.check_worth("the log")


def test_a_filter_that_keeps_nothing_at_all_is_ended_in_words():
    rounds = books(m=8, staleness=0)
    lose_rounds(rounds, 0, filtered=40)
    with pytest.raises(NothingToLearnError, match="of 160 rollouts since the last update no prompt had both outcomes"):
        rounds.check_worth("the log")


def test_a_snapshot_holds_what_is_planned_what_grows_and_what_waits_and_does_not_change_afterwards():
    rounds = books(m=8, staleness=1)
    plan(rounds, [4, 4, 2, 2])
    start_all(rounds)
    finish(rounds, 0)
    saved = rounds.snapshot()
    finish(rounds, 1)
    start_all(rounds)
    assert [prompt.task_id for prompt in saved.planned] == ["0.2", "0.3"]
    assert {ticket: prompt.task_id for ticket, prompt in saved.pending.items()} == {1: "0.1"}
    assert [tree.task.id for tree in saved.waiting] == ["0.0"]
    assert saved.dataset == {"position": 1}
    again = books(m=8, staleness=1)
    again.restore(saved)
    again.check_ledger()
    assert again.outstanding_roots == 8
    assert again.start()[1].task_id == "0.2"


class Simulation:
    """A whole run under random delays, losses, filters and resumes, with what must hold asserted at every event."""

    def __init__(self, seed: int, m: int, staleness: int, loss: float, dropped: float) -> None:
        self.rng = random.Random(seed)
        self.m, self.staleness, self.loss, self.dropped = m, staleness, loss, dropped
        self.rounds = books(m, staleness, updates=8)
        self.sizes: list[int] = []
        self.training: list[RolloutTree] = []

    def possible(self) -> list[str]:
        """Nothing starves: unless the run is over, some event is always possible without waiting for another."""
        rounds = self.rounds
        events = [
            *(["plan"] if rounds.wants_round() else []),
            *(["start"] if rounds.may_start() else []),
            *(["end"] * 2 if rounds.pending else []),
            *(["account"] if self.training else ["take"] if rounds.ready() else []),
            *(["resume"] if not self.training and self.rng.random() < 0.05 else []),
        ]
        assert events or rounds.finished(), "nothing is under way, nothing is ready, and the run is not over"
        return events

    def step(self) -> None:
        rounds, rng = self.rounds, self.rng
        match rng.choice(self.possible()):
            case "plan":
                plan(rounds, self.counts())
            case "start":
                before = rounds.outstanding_roots
                rounds.start()
                assert before < (self.staleness + 1) * self.m
            case "end":
                self.end(rng.choice(list(rounds.pending)))
            case "take":
                self.training = rounds.take()  # asserts the staleness bound
                self.sizes.append(sum(len(tree.rollouts) for tree in self.training))
            case "account":
                rounds.account(self.training, updated=rng.random() < 0.8)  # asserts that the ledger adds up
                self.training = []
            case "resume":
                self.rounds = books(self.m, self.staleness, updates=8)
                self.rounds.restore(rounds.snapshot())
                self.rounds.check_ledger()

    def counts(self) -> list[int]:
        counts, left = [], self.m
        while left:
            counts.append(min(left, self.rng.randint(1, MAX_ROLLOUTS)))
            left -= counts[-1]
        return counts

    def end(self, ticket: int) -> None:
        if self.rng.random() < self.loss / 2:
            self.rounds.lose(ticket, LossKind.PROMPT_ACTOR_DIED)
            return
        roots = self.rounds.pending[ticket].num_roots
        lost = sum(self.rng.random() < self.loss / 2 for _ in range(roots))
        finish(self.rounds, ticket, lost=lost, keep=self.rng.random() >= self.dropped)


@settings(max_examples=120, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    m=st.integers(4, 24),
    staleness=st.integers(0, 4),
    loss=st.sampled_from([0.0, 0.3]),
    dropped=st.sampled_from([0.0, 0.5]),
)
def test_whatever_happens_the_bound_holds_the_ledger_adds_up_and_nothing_starves(seed, m, staleness, loss, dropped):
    simulation = Simulation(seed, m, staleness, loss, dropped)
    while not simulation.rounds.finished():
        simulation.step()
    rounds = simulation.rounds
    assert rounds.state.num_updates == 8
    assert not rounds.pending
    assert not rounds.buffer.waiting
    ledger = rounds.state.ledger
    assert sum(ledger.trained.values()) == sum(simulation.sizes)
    ledger.check(waiting=0, in_flight_roots=0)
    # Near M: at least M but for what nobody could know at the end; never more than may be ahead of the learner.
    assert min(simulation.sizes) >= m
    assert max(simulation.sizes) <= (staleness + 1) * m + MAX_ROLLOUTS
    assert sum(simulation.sizes) <= 8 * m + 8 * MAX_ROLLOUTS + staleness * m
