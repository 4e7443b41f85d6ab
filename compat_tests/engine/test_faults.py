"""Whatever fails, at whatever moment: accounts stay right, everybody is answered rightly or told, and serving goes on."""

import pytest
from structlog.testing import capture_logs

from compat_tests.effort import usually
from compat_tests.engine.faults import Faults, every_fault
from compat_tests.engine.toy import (
    ONE_GROUP,
    TWO_GROUPS,
    Answers,
    ScriptedDrafter,
    ToyRunner,
    alone,
    drain,
    make_engine,
    request,
)
from helix_gateway.core.errors import OutOfMemoryError
from helix_gateway.core.protocols import StopMatch
from helix_gateway.engine.depth import FixedDepth
from helix_gateway.engine.engine import ChoiceHooks

# Prefixes that are shared, choices that fork, log-probabilities of both kinds, a stop in mid-window, a late arrival with
# the best priority, and too little memory for all of it at once.
REQUESTS = [
    request("plain", range(1, 12), max_tokens=5, temperature=0.8, seed=3, ignore_eos=True),
    request("choices", range(1, 11), n=3, max_tokens=4, temperature=1.0, seed=5, logprobs=2, ignore_eos=True),
    request("scored", [1, 2, 3, 4, 9], max_tokens=3, prompt_logprobs=1, temperature=0.0, ignore_eos=True),
    request("stopped", [4, 3, 2, 1], max_tokens=8, temperature=1.0, seed=1, ignore_eos=True),
    request("urgent", range(1, 12), max_tokens=3, temperature=0.0, priority=-1, ignore_eos=True),
]
AFTERWARDS = request("afterwards", range(1, 15), n=2, max_tokens=4, temperature=1.0, seed=9, ignore_eos=True)


ALONE = ("StopAfter.feed", "PagedKVCache.commit", "PagedKVCache.fork")
ALONE += ("Anything.fill_mask", "Anything.advance", "Anything.rollback")
"""Sites that concern one request, once its step has been computed."""


rooms = pytest.mark.parametrize(
    "room", [usually((pages, budget), (pages, budget) == (13, 8)) for pages in (11, 12, 13) for budget in (3, 8, 32)]
)
"""(pages of the pool, tokens of a step): every fault meets another moment."""


class StopAfter:
    """Ends a sequence with its third token."""

    def __init__(self):
        self.left = 3

    def feed(self, token_ids):
        self.left -= len(token_ids)
        return StopMatch(len(token_ids) + self.left, "here") if self.left <= 0 else None


class Anything:
    """A constraint that allows every token."""

    def fill_mask(self, mask):
        mask[:] = 0xFFFFFFFF

    def advance(self, token_id):
        pass

    def rollback(self, num_tokens):
        pass


@pytest.fixture(autouse=True)
def lines():
    """What is logged; a thousand tracebacks are not for reading."""
    with capture_logs() as captured:
        yield captured


@pytest.fixture(scope="module")
def wanted():
    answers = {}
    for each in [*REQUESTS, AFTERWARDS]:
        answers |= alone(each, TWO_GROUPS)
    del answers["stopped", 0].token_ids[3:]
    return answers


class Scene:
    """All requests, served with some faults, and what became of them."""

    def __init__(self, faults, wanted, num_pages, budget):
        runner, policy = ToyRunner(TWO_GROUPS, num_pages), FixedDepth(2)
        stop, constraint = StopAfter(), Anything()
        self.hooks = {"stopped": [ChoiceHooks(stop=stop)], "urgent": [ChoiceHooks(constraint=constraint)]}
        drafter = ScriptedDrafter(self.draft)
        self.engine = make_engine(
            num_pages, TWO_GROUPS, budget=budget, runner=runner, drafter=drafter, depth_policy=policy
        )
        self.wanted = wanted
        self.answers = Answers()
        self.concerned = set()
        """Requests that the engine was at work on when something failed."""
        faults.guard(runner, "copy_pages", "forward", "sample", "logprobs")
        faults.guard(drafter, "propose")
        faults.guard(policy, "most", "choose")
        faults.guard(self.engine.cache, "add", "fork", "reserve", "commit")
        faults.guard(self.engine.cache.pool, "allocate", "share")
        faults.guard(stop, "feed")
        faults.guard(constraint, "fill_mask", "advance", "rollback")
        faults.watcher = self.take_note

    def draft(self, sequence, tokens):
        """Two right ones of three."""
        place = len(tokens) - sequence.num_prompt_tokens
        known = self.wanted[sequence.key].token_ids
        return known[place] if place < len(known) and place % 3 else 7

    def take_note(self):
        waiting = list(self.engine._scheduler.waiting)[:1]
        self.concerned.update(sequence.request.request_id for sequence in [*self.engine.running, *waiting])

    def serve(self, requests):
        for each in requests:
            self.engine.submit(each, self.hooks.get(each.request_id, ()))
            self.step()
        for _ in range(500):
            if not self.engine.has_work():
                break
            self.step()
        assert not self.engine.has_work(), "it does not come to an end"
        assert self.engine.cache.pool.num_referenced == 0

    def step(self):
        self.answers.take(self.engine.step())
        self.engine.check()

    def failures(self):
        """The last events of those requests that failed; all others must be answered rightly."""
        failures = {}
        for key, wanted in self.wanted.items():
            got = self.answers[key]
            if got.last.finish_reason == "error":
                failures[key[0]] = got.last
            else:
                assert (got.token_ids, got.logprobs) == (wanted.token_ids, wanted.logprobs), key
                assert got.prompt_logprobs == wanted.prompt_logprobs, key
        return failures


def served(faults, wanted, room):
    """Everybody served with faults, and one request more without."""
    scene = Scene(faults, wanted, *room)
    scene.serve(REQUESTS)
    faults.disarm()
    scene.serve([AFTERWARDS])
    failures = scene.failures()
    assert "afterwards" not in failures
    return scene, failures


def test_without_faults_everybody_is_answered_and_all_that_can_fail_is_called(wanted):
    faults = Faults(at=0)
    scene, failures = served(faults, wanted, (13, 8))
    assert not failures
    assert scene.engine.num_preemptions > 0
    assert len(faults.sites) == 17


@rooms
def test_memory_that_is_short_once_costs_a_smaller_step_and_nobody_an_answer(wanted, room):
    for faults in every_fault(lambda: OutOfMemoryError("no room")):
        _, failures = served(faults, wanted, room)
        if failures:  # a step that was computed cannot be computed anew: its one request fails
            assert faults.raised[0] in (*ALONE, "BlockPool.share")
            (last,) = failures.values()
            assert "memory" in last.error
            assert last.error_kind == "out_of_memory"


@rooms
def test_memory_that_stays_short_fails_everybody_with_a_clear_error_and_serves_again_once_it_is_back(wanted, room):
    for faults in every_fault(lambda: OutOfMemoryError("no room"), lasting=True):
        _, failures = served(faults, wanted, room)
        assert all("memory" in last.error and last.error_kind == "out_of_memory" for last in failures.values())


@rooms
def test_a_fault_anywhere_fails_those_at_work_and_nobody_else(wanted, room):
    for faults in every_fault(lambda: ZeroDivisionError("a fault")):
        scene, failures = served(faults, wanted, room)
        # Without a draft a sequence goes on plainly.
        harmless = {"ScriptedDrafter.propose", "FixedDepth.most"}
        assert bool(failures) == bool(faults.raised and faults.raised[0] not in harmless)
        assert failures.keys() <= scene.concerned
        assert all("ZeroDivisionError" in last.error for last in failures.values())
        assert all(last.error_kind == "failed" for last in failures.values())
        if faults.raised and faults.raised[0] in ALONE:
            assert len(failures) == 1


class SmallDevice(ToyRunner):
    """Has room for six tokens a step."""

    def forward(self, batch):
        if len(batch.token_ids) > 6:
            raise OutOfMemoryError("no room")
        return super().forward(batch)


@pytest.mark.parametrize("caching", [True, False])
def test_a_device_that_stays_small_serves_prompts_longer_than_its_step(caching):
    runner = SmallDevice(ONE_GROUP, 200)
    engine = make_engine(runner=runner, budget=64, enable_prefix_caching=caching)
    requests = [request(f"r{i}", range(1, 40 + i), n=2, temperature=1.0, ignore_eos=True) for i in range(3)]
    for each in requests:
        engine.submit(each)
    answers = drain(engine, max_steps=400)
    for each in requests:
        for key, wanted in alone(each).items():
            assert answers[key].token_ids == wanted.token_ids
