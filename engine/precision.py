"""float32 means float32: no TF32 or bfloat16 shortcuts inside matrix products while an engine computes, no autocast.

Torch's switches are global to the process, and several engines may run at once: the first one in turns them off, the
last one out restores what the caller had.
"""

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

AUTOCAST = ("cpu", "cuda")  # whose autocast, the calling thread's own, may be on
_lock = threading.Lock()
_inside = 0
_before: list[str] = []


@contextmanager
def true_float32() -> Iterator[None]:
    global _inside, _before
    with _lock:
        if _inside == 0:
            _before = [scope.fp32_precision for scope in _scopes()]
            for scope in _scopes():
                scope.fp32_precision = "ieee"
        _inside += 1
    try:
        with ExitStack() as stack:
            for device in filter(torch.is_autocast_enabled, AUTOCAST):
                stack.enter_context(torch.autocast(device, enabled=False))
            yield
    finally:
        with _lock:
            _inside -= 1
            if _inside == 0:
                for scope, precision in zip(_scopes(), _before, strict=True):
                    scope.fp32_precision = precision


def _scopes() -> list[Any]:
    cudnn, mkldnn = torch.backends.cudnn, torch.backends.mkldnn
    return [torch.backends.cuda.matmul, cudnn.conv, cudnn.rnn, mkldnn.matmul, mkldnn.conv, mkldnn.rnn]
