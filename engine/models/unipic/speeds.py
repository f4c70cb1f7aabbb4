"""What a speed stands for: shares of a checkpoint's own rounds and head steps, to mean the same at any size."""

from typing import Any

from .config import UniPicConfig

LEAST_STEPS = 2  # of the head


def speeds(config: UniPicConfig) -> dict[str, dict[str, Any]]:
    """Fields of a Task; docs/speed.md has what they cost."""
    return {
        "balanced": {"head_steps": _head(config, 0.4, 0.1), "cfg_cache": 2.0},
        "fast": {
            "steps": max(1, round(0.75 * config.rounds)),
            "head_steps": _head(config, 0.2, 0.1),
            "order": "gtr",
            "cfg_cache": 2.0,
        },
    }


def _head(config: UniPicConfig, first: float, last: float) -> tuple[int, int]:
    """Steps in the first and in the last round."""
    least = min(LEAST_STEPS, config.head.steps)
    return max(least, round(first * config.head.steps)), max(least, round(last * config.head.steps))
