"""The pickle inside a torch zip file, read as data: a dict of tensor descriptions, and nothing else.

Nothing is imported and nothing is called. `pickletools` splits the bytes into opcodes; the few opcodes that torch
writes are carried out on plain values, three callables are recognised by name and replaced by functions below, and
anything else raises CorruptWeightsError. Time and memory are bounded by MAX_PICKLE and MAX_OPCODES.
"""

import pickletools
import struct
from dataclasses import dataclass
from typing import Any

from ..errors import CorruptWeightsError

MAX_PICKLE = 16 * 2**20  # bytes; the released 1403 tensors take 160 kB
MAX_OPCODES = 500_000  # about 25 a tensor
MAX_DIMS = 8
MAX_NAME = 1_024

STORAGES = {
    "DoubleStorage": "float64",
    "FloatStorage": "float32",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
}


@dataclass(frozen=True)
class Storage:
    key: str
    dtype: str
    numel: int


@dataclass(frozen=True)
class Described:
    """A tensor as the pickle describes it; `offset` and `strides` count elements. Nothing is checked against a file."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


@dataclass(frozen=True)
class _Name:
    """An allowed global: only its name."""

    module: str
    name: str


class _Mark:
    pass


_ALLOWED = {("collections", "OrderedDict"), ("torch._utils", "_rebuild_tensor_v2")}
_ALLOWED |= {("torch._utils", "_rebuild_parameter")} | {("torch", name) for name in STORAGES}
_MARK = _Mark()
_HOSTILE = "the file may try to run code: delete it"


def read_pickle(data: bytes) -> dict[Any, Any]:
    """The dict that `data` describes, with Described where the tensors are."""
    if len(data) > MAX_PICKLE:
        raise _refused(f"a pickle of {len(data)} bytes, more than {MAX_PICKLE}")
    stack: list[Any] = []
    memo: dict[int, Any] = {}
    try:
        for count, (opcode, arg, _) in enumerate(pickletools.genops(data)):
            if count >= MAX_OPCODES:
                raise _refused(f"more than {MAX_OPCODES} opcodes")
            if opcode.name == "STOP":
                break
            step = _OPCODES.get(opcode.name)
            if step is None:
                raise _refused(f"opcode {opcode.name} {str(arg)[:80]}, which weights do not need", _HOSTILE)
            step(stack, memo, arg)
        (result,) = stack
    except CorruptWeightsError:
        raise
    except (ValueError, IndexError, KeyError, TypeError, OverflowError, struct.error) as error:
        raise _refused(f"a damaged pickle ({type(error).__name__})") from None
    if type(result) is not dict:
        raise _refused(f"a {type(result).__name__} where a dict of tensors belongs")
    return result


def _popped(stack: list[Any]) -> list[Any]:
    """Everything above the topmost mark, the mark itself dropped."""
    items = []
    while (item := stack.pop()) is not _MARK:
        items.append(item)
    return items[::-1]


def _tuple(n: int) -> Any:
    def step(stack: list[Any], memo: dict[int, Any], arg: Any) -> None:
        if len(stack) < n:
            raise IndexError
        stack[len(stack) - n :] = [tuple(stack[len(stack) - n :])]

    return step


def _set(stack: list[Any], pairs: list[Any]) -> None:
    target = stack[-1]
    if type(target) is not dict or len(pairs) % 2:
        raise _refused(f"items set on a {type(target).__name__}")
    for key, value in zip(pairs[::2], pairs[1::2], strict=True):
        if type(key) not in (str, int):  # hashing a nested tuple could recurse without end
            raise _refused(f"a {type(key).__name__} as a key")
        target[key] = value


def _extend(stack: list[Any], items: list[Any]) -> None:
    if type(stack[-1]) is not list:
        raise _refused(f"items appended to a {type(stack[-1]).__name__}")
    stack[-1].extend(items)


def _global(stack: list[Any], module: Any, name: Any) -> None:
    if type(module) is not str or type(name) is not str or (module, name) not in _ALLOWED:
        raise _refused(f"a reference to {str(module)[:80]}.{str(name)[:80]}", _HOSTILE)
    stack.append(_Name(module, name))


def _reduce(stack: list[Any], memo: dict[int, Any], arg: Any) -> None:
    args, function = stack.pop(), stack.pop()
    if type(args) is not tuple or type(function) is not _Name:
        raise _refused(f"a call of a {type(function).__name__}")
    if function.name == "OrderedDict" and not args:
        stack.append({})
    elif function.name == "_rebuild_tensor_v2" and len(args) in (6, 7):
        stack.append(_tensor(*args[:4]))
    elif function.name == "_rebuild_parameter" and len(args) == 3 and type(args[0]) is Described:
        stack.append(args[0])
    else:
        raise _refused(f"a call of {function.module}.{function.name} with {len(args)} arguments")


def _tensor(storage: Any, offset: Any, shape: Any, strides: Any) -> Described:
    sizes_ok = all(type(sizes) is tuple and len(sizes) <= MAX_DIMS for sizes in (shape, strides))
    if type(storage) is not Storage or not sizes_ok or len(shape) != len(strides):
        raise _refused("a tensor whose description is no tensor's")
    if not all(type(n) is int and 0 <= n < 2**48 for n in (offset, *shape, *strides)):
        raise _refused("a tensor with a negative, huge or non-integer size, stride or offset")
    return Described(storage, offset, shape, strides)


def _storage(stack: list[Any], memo: dict[int, Any], arg: Any) -> None:
    match stack.pop():
        case ("storage", _Name("torch", kind), str(key), str(), int(numel)) if kind in STORAGES and len(key) < MAX_NAME:
            stack.append(Storage(key, STORAGES[kind], numel))
        case _:
            raise _refused("a persistent id that is not a tensor storage")


def _build(stack: list[Any], memo: dict[int, Any], arg: Any) -> None:
    # A module's state dict carries `_metadata` as attributes of its OrderedDict: read past it, keep nothing.
    state = stack.pop()
    if type(state) is not dict or type(stack[-1]) is not dict:
        raise _refused(f"state set on a {type(stack[-1]).__name__}")


def _remember(stack: list[Any], memo: dict[int, Any], arg: Any) -> None:
    memo[len(memo) if arg is None else arg] = stack[-1]


def _push(stack: list[Any], memo: dict[int, Any], arg: Any) -> None:
    if type(arg) is int and abs(arg) >= 2**63:
        raise _refused("an integer of more than 64 bits")
    stack.append(arg)


def _refused(what: str, remedy: str = "only plain dicts of tensors are read; get the weights from their source") -> Any:
    return CorruptWeightsError(f"the weights' pickle holds {what}", remedy)


_OPCODES: dict[str, Any] = {
    **dict.fromkeys(("PROTO", "FRAME"), lambda s, m, a: None),
    **dict.fromkeys(("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT"), _push),
    **dict.fromkeys(("BINUNICODE", "SHORT_BINUNICODE"), _push),
    **dict.fromkeys(("BINPUT", "LONG_BINPUT", "MEMOIZE"), _remember),
    **dict.fromkeys(("BINGET", "LONG_BINGET"), lambda s, m, a: s.append(m[a])),
    "NONE": lambda s, m, a: s.append(None),
    "NEWTRUE": lambda s, m, a: s.append(True),
    "NEWFALSE": lambda s, m, a: s.append(False),
    "EMPTY_DICT": lambda s, m, a: s.append({}),
    "EMPTY_LIST": lambda s, m, a: s.append([]),
    "MARK": lambda s, m, a: s.append(_MARK),
    "EMPTY_TUPLE": _tuple(0),
    "TUPLE1": _tuple(1),
    "TUPLE2": _tuple(2),
    "TUPLE3": _tuple(3),
    "TUPLE": lambda s, m, a: s.append(tuple(_popped(s))),
    "SETITEM": lambda s, m, a: _set(s, [s.pop(-2), s.pop()]),
    "SETITEMS": lambda s, m, a: (lambda pairs: _set(s, pairs))(_popped(s)),
    "APPEND": lambda s, m, a: (lambda item: _extend(s, [item]))(s.pop()),
    "APPENDS": lambda s, m, a: (lambda items: _extend(s, items))(_popped(s)),
    "GLOBAL": lambda s, m, a: _global(s, *a.split(" ", 1)),
    "STACK_GLOBAL": lambda s, m, a: _global(s, s.pop(-2), s.pop()),
    "REDUCE": _reduce,
    "BUILD": _build,
    "BINPERSID": _storage,
}
