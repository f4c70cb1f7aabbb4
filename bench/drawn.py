"""Arguments of a case made where they are needed: random numbers are drawn there instead of being copied.

On the meta device nothing is drawn at all. Another kind of device draws other numbers from the same seed; which they
are is all the same, as long as they are the same each time.
"""

from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from unipic_run.kernels._op import Case

FACTORIES = {
    getattr(torch, name)
    for name in ("arange", "empty", "full", "ones", "rand", "randint", "randn", "randperm", "zeros", "linspace")
}


class There(TorchFunctionMode):
    """Inside, tensors are made on a device, and a generator of the CPU stands for one of that device."""

    def __init__(self, device: torch.device | str) -> None:
        self.device = torch.device(device)
        self.generators: dict[torch.Generator, torch.Generator] = {}

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if function in FACTORIES:
            generator = kwargs.pop("generator", None)
            kwargs["device"] = self.device
            if generator is not None and self.device.type != "meta":
                kwargs["generator"] = self._own(generator)
        elif function is torch.tensor:
            kwargs["device"] = self.device
        return function(*args, **kwargs)

    def _own(self, generator: torch.Generator) -> torch.Generator:
        if generator not in self.generators:
            self.generators[generator] = torch.Generator(self.device).manual_seed(generator.initial_seed())
        return self.generators[generator]


def drawn(case: Case, device: torch.device | str) -> tuple[Any, ...]:
    """As `case.make(device)`."""
    try:
        with There(device):
            return case.make(device)
    except (RuntimeError, NotImplementedError, TypeError):  # a case that reads its own values, or mixes devices
        return case.make(device)
