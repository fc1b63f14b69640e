"""The scheduler against a plain model: every wanted block comes, once at a time, the urgent ones first."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from csi.stream import blocks
from csi.stream.scheduler import Job, Priority, Scheduler, background_order

COUNTS = [1, 20, 3, 0]


class SchedulerMachine(RuleBasedStateMachine):
    """`present`, `flying` and `demanded` are the model."""

    def __init__(self) -> None:
        super().__init__()
        self.present: set[tuple[int, int]] = set()
        self.flying: dict[tuple[int, int], Job] = {}
        self.demanded: set[tuple[int, int]] = set()
        self.scheduler = Scheduler(
            [count * blocks.BLOCK_BYTES for count in COUNTS], lambda blob, block: (blob, block) in self.present
        )

    @rule(
        blob=st.integers(0, len(COUNTS) - 1),
        first=st.integers(0, 22),
        count=st.integers(1, 5),
        priority=st.sampled_from([Priority.DEMAND, Priority.AHEAD]),
    )
    def want(self, blob: int, first: int, count: int, priority: Priority) -> None:
        self.scheduler.want(blob, first, count, priority)
        if priority is Priority.DEMAND:
            asked = {(blob, block) for block in range(first, min(first + count, COUNTS[blob]))}
            self.demanded |= asked - self.present

    @rule(least=st.sampled_from(list(Priority)), most=st.integers(1, 5), along=st.integers(0, 3))
    def take(self, least: Priority, most: int, along: int) -> None:
        job = self.scheduler.next_job(least, most, along=along)
        waiting = {key for key in self.demanded if key not in self.flying}
        if job is None:
            assert not waiting, "a demanded block is never left lying"
            return
        assert job.priority <= least
        assert 1 <= job.count <= most
        keys = list(job.blocks())
        assert not set(keys) & (self.present | set(self.flying)), "single flight"
        if waiting:
            assert keys[0] in waiting, "demand first"
        assert len({blocks.segment_of(block)[0] for _, block in keys}) == 1
        self.flying.update(dict.fromkeys(keys, job))

    @rule(data=st.data())
    def arrive(self, data: st.DataObject) -> None:
        if not self.flying:
            return
        key = data.draw(st.sampled_from(sorted(self.flying)))
        del self.flying[key]
        self.present.add(key)
        self.demanded.discard(key)
        self.scheduler.done(*key)

    @rule(data=st.data(), again=st.booleans())
    def fail(self, data: st.DataObject, again: bool) -> None:
        if not self.flying:
            return
        job = self.flying[data.draw(st.sampled_from(sorted(self.flying)))]
        for key in job.blocks():
            if self.flying.pop(key, None) is not None and not again:
                self.demanded.discard(key)
        self.scheduler.failed(job, again=again)

    @invariant()
    def nothing_is_demanded_and_present(self) -> None:
        assert not self.demanded & self.present

    def teardown(self) -> None:
        """Left alone, the background fill completes the model."""
        for key in list(self.flying):
            self.present.add(key)
            self.scheduler.done(*key)
        while job := self.scheduler.next_job(Priority.BACKGROUND, 2):
            for key in job.blocks():
                self.present.add(key)
                self.scheduler.done(*key)
        assert len(self.present) == sum(COUNTS)


TestScheduler = SchedulerMachine.TestCase
TestScheduler.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)


def test_small_files_are_filled_before_large_ones() -> None:
    mib = 1024 * 1024
    assert background_order([5000 * mib, 1, 8 * mib, 9 * mib]) == [1, 2, 0, 3]


def test_without_fill_nothing_is_fetched_unasked() -> None:
    scheduler = Scheduler([100 * blocks.BLOCK_BYTES], lambda blob, block: False, fill=False)
    assert scheduler.next_job(Priority.BACKGROUND, 2) is None


def test_the_background_leaves_what_need_only_be_checked_until_it_is_wanted() -> None:
    kept = {(0, 1)}
    scheduler = Scheduler([3 * blocks.BLOCK_BYTES], lambda blob, block: False, is_kept=lambda *key: key in kept)
    jobs: list[tuple[int, int]] = []
    while job := scheduler.next_job(Priority.BACKGROUND, 2):
        jobs += job.blocks()
    assert jobs == [(0, 0), (0, 2)]
    scheduler.want(0, 1, 1, Priority.DEMAND)
    job = scheduler.next_job(Priority.BACKGROUND, 2)
    assert job is not None
    assert list(job.blocks()) == [(0, 1)]


def test_a_scheduler_that_is_told_to_fill_later_fills() -> None:
    scheduler = Scheduler([blocks.BLOCK_BYTES], lambda blob, block: False, fill=False)
    assert scheduler.next_job(Priority.BACKGROUND, 2) is None
    scheduler.fill()
    assert scheduler.next_job(Priority.BACKGROUND, 2) is not None


def test_a_job_takes_neighbours_along_that_nobody_asked_for_only_as_far_as_it_may() -> None:
    kept = {(0, 12)}
    scheduler = Scheduler([30 * blocks.BLOCK_BYTES], lambda blob, block: False, is_kept=lambda *key: key in kept)
    scheduler.want(0, 1, 1, Priority.DEMAND)
    scheduler.want(0, 5, 3, Priority.DEMAND)
    scheduler.want(0, 11, 1, Priority.DEMAND)
    found = [scheduler.next_job(Priority.DEMAND, 4, along=2) for _ in range(3)]
    assert [(job.first, job.count) for job in found if job] == [(1, 2), (5, 3), (11, 1)]


def test_what_was_taken_along_is_not_asked_for_again_after_a_failure() -> None:
    scheduler = Scheduler([30 * blocks.BLOCK_BYTES], lambda blob, block: False)
    scheduler.want(0, 8, 1, Priority.DEMAND)
    job = scheduler.next_job(Priority.DEMAND, 4, along=2)
    assert job == Job(0, 8, 2, Priority.DEMAND)
    scheduler.failed(job, again=True)
    assert scheduler.next_job(Priority.DEMAND, 4) == Job(0, 8, 1, Priority.DEMAND)
    assert scheduler.next_job(Priority.AHEAD, 4) is None


def test_without_fill_nothing_is_taken_along() -> None:
    scheduler = Scheduler([30 * blocks.BLOCK_BYTES], lambda blob, block: False, fill=False)
    scheduler.want(0, 8, 1, Priority.DEMAND)
    assert scheduler.next_job(Priority.BACKGROUND, 4, along=4) == Job(0, 8, 1, Priority.DEMAND)


def scheduler_of(block_count: int, *, fill: bool = False) -> Scheduler:
    return Scheduler([block_count * blocks.BLOCK_BYTES], lambda blob, block: False, fill=fill)


def test_a_range_begins_with_the_first_of_the_neighbours_that_are_asked_for() -> None:
    scheduler = scheduler_of(40)
    for block in (22, 21, 20, 19, 30):
        scheduler.want(0, block, 1, Priority.DEMAND)
    assert scheduler.next_job(Priority.DEMAND, 4) == Job(0, 19, 4, Priority.DEMAND)
    assert scheduler.next_job(Priority.DEMAND, 4) == Job(0, 30, 1, Priority.DEMAND)
    for block in (17, 16, 15):
        scheduler.want(0, block, 1, Priority.DEMAND)
    assert scheduler.next_job(Priority.DEMAND, 4) == Job(0, 16, 2, Priority.DEMAND), "another segment is another file"
    for block in (7, 6, 5, 4, 3):
        scheduler.want(0, block, 1, Priority.DEMAND)
    found = scheduler.next_job(Priority.DEMAND, 4)
    assert found == Job(0, 15, 1, Priority.DEMAND)
    found = scheduler.next_job(Priority.DEMAND, 4)
    assert found == Job(0, 4, 4, Priority.DEMAND), "the one that was asked for first is in it"


def test_how_urgent_a_block_in_flight_is_and_that_somebody_waits() -> None:
    scheduler = scheduler_of(8, fill=True)
    job = scheduler.next_job(Priority.BACKGROUND, 4)
    assert job == Job(0, 0, 4, Priority.BACKGROUND)
    assert (scheduler.urgency_of(0, 2), scheduler.is_demanded, scheduler.in_flight) == (Priority.BACKGROUND, False, 4)
    scheduler.want(0, 2, 1, Priority.AHEAD)
    assert (scheduler.urgency_of(0, 2), scheduler.is_demanded) == (Priority.AHEAD, False)
    scheduler.want(0, 2, 1, Priority.DEMAND)
    assert (scheduler.urgency_of(0, 2), scheduler.is_demanded) == (Priority.DEMAND, True)
    scheduler.done(0, 2)
    assert not scheduler.is_demanded
    scheduler.want(0, 7, 1, Priority.DEMAND)
    assert scheduler.is_demanded
