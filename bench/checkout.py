"""A bench measures the checkout it lies in, and nothing else that happens to be installed."""

import sys
from pathlib import Path

import unipic_run


def require_this_checkout(script: str) -> Path:
    """The checkout's root; exits with a sentence when `unipic_run` is a copy from anywhere else."""
    root = Path(script).resolve().parents[1]
    installed = Path(unipic_run.__file__).resolve().parent
    if installed != root:
        sys.exit(
            f"{script} belongs to {root}, but Python imports unipic_run from {installed}: run `pip install -e {root}`"
        )
    return root
