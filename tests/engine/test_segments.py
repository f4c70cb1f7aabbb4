"""torch's allocator played through with numbers, against its documented rules."""

import random

import pytest
from unipic_run.engine.segments import GrowingSegments, Segments

MIB = 2**20


def test_sizes_of_segments():
    for nbytes, segment in ((1, 2), (MIB, 2), (MIB + 1, 20), (10 * MIB - 512, 20), (10 * MIB, 10), (11 * MIB + 1, 12)):
        segments = Segments()
        segments.take(nbytes)
        assert segments.reserved == segment * MIB, nbytes


def test_blocks_share_a_segment_and_what_is_given_back_is_taken_again():
    segments = Segments()
    blocks = [segments.take(5 * MIB) for _ in range(4)]
    assert segments.reserved == 20 * MIB
    segments.give(blocks[1])
    segments.give(blocks[0])  # joins its neighbour
    assert segments.take(10 * MIB - 512) and segments.reserved == 20 * MIB
    assert segments.take(600 * 2**10) and segments.reserved == 22 * MIB, "small ones live in segments of their own"


def test_the_smallest_that_is_large_enough_is_taken_and_a_rest_of_a_mib_stays_with_it():
    segments = Segments()
    large, small = segments.take(64 * MIB), segments.take(32 * MIB)
    segments.give(large)
    segments.give(small)
    taken = segments.take(31 * MIB)
    assert taken is small and taken.nbytes == 32 * MIB
    assert segments.take(30 * MIB) is large and large.nbytes == 30 * MIB and segments.reserved == 96 * MIB


@pytest.mark.parametrize("kind", [Segments, GrowingSegments])
def test_whatever_comes_and_goes_all_room_is_accounted_for(kind):
    draw, segments, living = random.Random(5), kind(), []
    for _ in range(3000):
        if living and draw.random() < 0.5:
            segments.give(living.pop(draw.randrange(len(living))))
        else:
            living.append(segments.take(draw.choice((700, 300_000, 3 * MIB, 30 * MIB)) + draw.randrange(9999)))
        assert segments.reserved == free_in(segments) + sum(block.nbytes for block in living)
    draw.shuffle(living)
    for block in living:
        segments.give(block)
    assert free_in(segments) == segments.reserved
    holes = [row for rows in segments._free.values() for row in rows]
    assert all(block.before is block.after is None for *_, block in holes), "segments are whole again"
    assert kind is Segments or not holes


def free_in(segments):
    """Bytes."""
    holes = sum(size for rows in segments._free.values() for size, *_ in rows)
    return holes + sum(getattr(segments, "_tail", {}).values())


# ---- segments that grow


def test_one_segment_grows_by_pages():
    segments = GrowingSegments()
    for nbytes, reserved in ((MIB, 2), (MIB, 2), (512, 4), (MIB + 1, 24), (18 * MIB, 24), (30 * MIB, 64)):
        segments.take(nbytes)
        assert segments.reserved == reserved * MIB, nbytes


def test_ever_larger_blocks_leave_nothing_behind():
    fixed, growing = Segments(), GrowingSegments()
    for size in range(12, 60, 3):
        for segments in (fixed, growing):
            kept, block = segments.take(2 * MIB), segments.take(size * MIB)
            segments.give(block)
            segments.give(kept)
    assert growing.reserved == 60 * MIB < fixed.reserved / 5


def test_a_hole_is_taken_before_the_end_of_the_segment():
    segments = GrowingSegments()
    first, second = segments.take(8 * MIB), segments.take(8 * MIB)
    segments.give(first)
    assert segments.take(3 * MIB) is first and first.after.nbytes == 5 * MIB, "although 4 MiB at the end fit better"
    segments.give(second)
    assert segments.take(17 * MIB) and segments.reserved == 20 * MIB, "the hole, the block and the end are one again"


def test_a_copy_goes_on_alone():
    segments = GrowingSegments()
    blocks = [segments.take(6 * MIB) for _ in range(3)]
    segments.give(blocks[1])
    other = segments.copy()
    hole, end = other.take(6 * MIB), other.take(2 * MIB)
    assert other.reserved == segments.reserved == 20 * MIB
    other.take(30 * MIB)
    other.give(end)
    other.give(hole)
    assert other.reserved == 60 * MIB and segments.reserved == 20 * MIB
