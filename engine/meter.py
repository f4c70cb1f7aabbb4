"""Counts what a computation needs while it runs, also on the meta device, where nothing is computed at all.

    with torch.inference_mode(), Meter() as meter:
        meter.stage = "sample"
        ...
    meter.peaks["sample"], meter.total(stage="sample").flop

Memory is that of storages that live, so views cost nothing and a storage counts until its last view has gone. Our own
operators say what they cost (`kernels/`); of torch's, matrix products, convolutions and attention are counted by their
formulas and everything else as free but for the bytes it moves. An operation of torch is one launch unless it only
makes a view or room. Works in inference mode only, where torch hands over whole operations such as attention.
"""

import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ..kernels._op import OPERATORS, Operator, recording

# Kinds of work by the names of torch's operations; whatever is not named is elementwise.
KINDS = {
    "matmul": "mm addmm bmm baddbmm _int_mm convolution",
    "attention": "scaled_dot_product_attention",
    "norm": "native_layer_norm native_group_norm _native_batch_norm_legit_no_training native_batch_norm "
    "cudnn_batch_norm",
    "movement": "copy_ clone _to_copy cat stack repeat index index_put index_put_ index_select gather scatter scatter_ "
    "embedding fill_ zero_ constant_pad_nd upsample_nearest2d zeros ones full arange",
}
KIND = {name: kind for kind, names in KINDS.items() for name in names.split()}
LOOKUPS = {"index", "index_select", "gather", "embedding"}  # read as much as they return, not the whole table
BLIND = {"copy_", "fill_", "zero_", "new_zeros", "new_ones", "new_full", "zeros_like", "ones_like", "full_like"}
FREE = {"lift_fresh", "detach_"}  # book-keeping of torch.tensor(...)
# Ours, by what their names contain.
OUR_KINDS = {"attention": "attention", "linear": "matmul", "int8_weight": "matmul", "norm": "norm"}


@dataclass(frozen=True)
class Call:
    """One operation, and what one such call costs."""

    stage: str
    kind: str  # matmul, attention, norm, elementwise, movement
    precision: str  # int8, bf16, fp16, fp32
    name: str
    shape: tuple[int, ...]  # of its first result
    flop: int
    nbytes: int  # read and written
    launches: int


@dataclass(frozen=True)
class Total:
    calls: int
    flop: int
    nbytes: int
    launches: int


class Meter(TorchDispatchMode):
    """`calls` counts equal operations together; `peaks` are the most bytes that lived, by stage."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[Call] = Counter()
        self.current = 0
        self.peaks: dict[str, int] = {}
        self._living: dict[int, tuple[weakref.ref, int]] = {}  # by the storage's address
        self._inside: list[int] = []  # launches so far in the operators of ours that are running, the innermost last
        self.stage = ""

    @property
    def stage(self) -> str:
        """What is counted from now on belongs to it, and what lives already counts towards its peak."""
        return self._stage

    @stage.setter
    def stage(self, name: str) -> None:
        self._stage = name
        self._peak()

    @property
    def peak(self) -> int:
        return max(self.peaks.values())

    def hold(self, tensors: Iterable[Tensor]) -> None:
        """Count tensors that were there before, such as weights, as living."""
        for tensor in tensors:
            self._live(tensor)

    def total(self, **wanted: str) -> Total:
        """The sum over the calls whose fields (stage, kind, ...) are as given."""
        found = [
            (call, times)
            for call, times in self.calls.items()
            if all(getattr(call, name) == value for name, value in wanted.items())
        ]
        flop, nbytes, launches = (
            sum(getattr(call, name) * times for call, times in found) for name in ("flop", "nbytes", "launches")
        )
        return Total(sum(times for _, times in found), flop, nbytes, launches)

    def __enter__(self) -> "Meter":
        if not torch.is_inference_mode_enabled():
            raise RuntimeError("a meter counts in torch.inference_mode() only")
        return super().__enter__()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if operator := OPERATORS.get(function._schema.name):
            return self._ours(operator, args, kwargs)
        if function._opname not in FORMULAS:
            with self:
                result = function.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        result = function(*args, **kwargs)
        self._torchs(function, args, kwargs, result)
        return result

    def _ours(self, operator: Operator, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        self._inside.append(0)
        with recording() as launches, self:  # sees what the launcher allocates and copies
            result = operator.triton(*args, **kwargs)
        cost = operator.cost(*args, **kwargs)
        count = len(launches) + max(self._inside.pop(), cost.launches)  # a library's are not seen on the meta device
        if self._inside:  # the operator around it has said what it costs
            self._inside[-1] += count
            return result
        tensors = list(tensors_in((args, kwargs)))
        kind = next((kind for part, kind in OUR_KINDS.items() if part in operator.name), "elementwise")
        self._note(kind, precision(tensors), operator.name, result, cost.flop, cost.nbytes, count)
        return result

    def _torchs(self, function: Any, args: Sequence[Any], kwargs: dict[str, Any], result: Any) -> None:
        name = function._opname
        results = list(tensors_in(result))
        read = list(tensors_in((args, kwargs)))
        fresh = [x for x in results if self._live(x, read)]
        writes = function._schema.is_mutable
        if "empty" in name or name in FREE or not (writes or fresh) or not any(x.numel() for x in results):
            return
        if self._inside:
            self._inside[-1] += 1
            return
        flop = FORMULAS[name](args, kwargs, result) if name in FORMULAS else 0
        moved = sum(touched(x) for x in results)
        if name in LOOKUPS:
            moved *= 2
        else:
            moved += sum(touched(x) for x in read[name in BLIND :])
        self._note(KIND.get(name, "elementwise"), precision(read or results), name, result, flop, moved, 1)

    def _note(self, kind: str, how: str, name: str, result: Any, flop: int, nbytes: int, launches: int) -> None:
        shape = next((tuple(x.shape) for x in tensors_in(result)), ())
        self.calls[Call(self.stage, kind, how, name, shape, flop, nbytes, launches)] += 1

    def _live(self, tensor: Tensor, read: Sequence[Tensor] = ()) -> bool:
        """Whether the tensor's storage is new, and not that of an argument; if so it counts until it dies."""
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._living or any(x.untyped_storage()._cdata == key for x in read):
            return False
        self._living[key] = weakref.ref(storage, lambda _: self._died(key)), size
        self.current += size
        self._peak()
        return True

    def _peak(self) -> None:
        self.peaks[self.stage] = max(self.peaks.get(self.stage, 0), self.current)

    def _died(self, key: int) -> None:
        self.current -= self._living.pop(key)[1]


def tensors_in(x: Any) -> Iterator[Tensor]:
    if isinstance(x, Tensor):
        yield x
    elif isinstance(x, (tuple, list, dict)):
        for part in x.values() if isinstance(x, dict) else x:
            yield from tensors_in(part)


def touched(x: Tensor) -> int:
    """Bytes that x covers in memory, an expanded dimension counting once."""
    return x.element_size() * prod(size for size, stride in zip(x.shape, x.stride(), strict=True) if stride)


def precision(tensors: list[Tensor]) -> str:
    """By the first tensor: in a product the activations, whose type the tensor cores multiply in."""
    names = {torch.int8: "int8", torch.bfloat16: "bf16", torch.float16: "fp16"}
    return names.get(tensors[0].dtype, "fp32") if tensors else "fp32"


def _product(left: int, right: int) -> Callable[..., int]:
    """The formula of a matrix product of the arguments at these places, (..., M, K) and (..., K, N)."""

    def flop(args: Sequence[Any], kwargs: dict[str, Any], result: Tensor) -> int:
        return 2 * args[left].numel() * args[right].shape[-1]

    return flop


def _convolution(args: Sequence[Any], kwargs: dict[str, Any], result: Tensor) -> int:
    x, weight, transposed = args[0], args[1], args[6]
    return 2 * (x if transposed else result).numel() * weight[0].numel()


def _attention(args: Sequence[Any], kwargs: dict[str, Any], result: Tensor) -> int:
    """Both products, q (..., L, d), k (..., S, d), v (..., S, e); of a causal mask only what it lets through."""
    q, k, v = args[:3]
    queries, keys = q.shape[-2], k.shape[-2]
    pairs = queries * keys
    if args[5] if len(args) > 5 else kwargs.get("is_causal", False):
        pairs = sum(min(row + 1, keys) for row in range(queries))
    return 2 * q[..., 0, 0].numel() * pairs * (q.shape[-1] + v.shape[-1])


FORMULAS = {
    "mm": _product(0, 1),
    "addmm": _product(1, 2),
    "bmm": _product(0, 1),
    "baddbmm": _product(1, 2),
    "_int_mm": _product(0, 1),
    "convolution": _convolution,
    "scaled_dot_product_attention": _attention,
}
