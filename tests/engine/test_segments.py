"""torch's allocator played through with numbers, against its documented rules."""

import random

from unipic_run.engine.segments import Segments

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


def test_whatever_comes_and_goes_all_room_is_accounted_for():
    draw, segments, living = random.Random(5), Segments(), []
    for _ in range(3000):
        if living and draw.random() < 0.5:
            segments.give(living.pop(draw.randrange(len(living))))
        else:
            living.append(segments.take(draw.choice((700, 300_000, 3 * MIB, 30 * MIB)) + draw.randrange(9999)))
        assert segments.reserved >= sum(block.nbytes for block in living)
    for block in living:
        segments.give(block)
    free = [row for rows in segments._free.values() for row in rows]
    assert sum(size for size, *_ in free) == segments.reserved
    assert all(block.before is block.after is None for *_, block in free), "segments are whole again"
