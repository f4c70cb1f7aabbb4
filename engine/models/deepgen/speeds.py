"""What a speed stands for: fewer steps along the same shifted path, as shares of a checkpoint's own number.

Of all ways to the same time this one stays nearest to exact pictures on the recorded models; docs/speed.md says what
that is worth.
"""

from typing import Any

SHARES = {"balanced": 0.56, "fast": 0.36}


def speeds(config: Any) -> dict[str, dict[str, Any]]:
    """Fields of a Task; config: any with `rounds`."""
    return {name: {"steps": max(1, round(share * config.rounds))} for name, share in SHARES.items()}
