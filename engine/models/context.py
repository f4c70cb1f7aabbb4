"""What a language model's context has room for, whichever family it belongs to."""

from collections.abc import Sequence

from ..errors import UsageError


def room_behind(before: Sequence[int], picture: int, after: Sequence[int], limit: int, most: int) -> int:
    """Positions that a question's ids `after` a picture and `limit` new tokens take, of at most `most` in all.

    `before`: ids in front of the picture, which takes so many positions. Raises UsageError if there are not enough.
    """
    room = len(after) + limit
    used = len(before) + picture + room
    if used > most:
        raise UsageError(
            f"picture, question and {limit} new tokens take {used} positions, the model has {most}",
            "use fewer max_new_tokens or a smaller res, or ask something shorter",
        )
    return room
