"""One kernel, compiled as a user's launch would compile it, and what the binary then needs. No GPU takes part.

Everything that goes in and comes out is plain data, so that it can travel to another process. Triton is imported where
it is used, since this file must import without it.
"""

import importlib.util
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from unipic_run.kernels._op import Launch
from unipic_run.kernels._tuned import HOME

# The type of both operands of each tensor-core-sized product, in Triton's own code and in PTX.
DOT = re.compile(r"tt\.dot .*: tensor<[\dx]+x(\w+)> \* tensor<[\dx]+x(\w+)>")
MMA = re.compile(r"mma(?:_async)?\.\S*\.(s8|u8|bf16|f16|tf32|e4m3|e5m2)\.(?:s8|u8|bf16|f16|tf32|e4m3|e5m2)\b")


@dataclass(frozen=True)
class Configuration:
    """What makes a binary: the kernel, and of its arguments only the types, the constants and the alignment."""

    module: str  # by its import name, or the path of a file
    kernel: str
    signature: dict[str, str]
    constexprs: dict[tuple[int, ...], Any]
    attrs: dict[tuple[int, ...], Any]
    options: dict[str, Any]  # num_warps, num_stages
    int8_operands: int  # distinct int8 tensors among the arguments

    @property
    def aligned(self) -> list[str]:
        """The arguments known to be multiples of 16."""
        names = list(self.signature)
        return [names[at[0]] for at, marks in self.attrs.items() if marks]

    @property
    def key(self) -> str:
        return repr((self.module, self.kernel, self.signature, self.constexprs, self.attrs, self.options))

    def __str__(self) -> str:
        names = list(self.signature)
        named = {names[at[0]]: value for at, value in self.constexprs.items()}
        constants = {name: value for name, value in named.items() if name.isupper() and value is not False}
        flags = [name if value is True else f"{name}={value}" for name, value in constants.items()]
        options = [f"{name.removeprefix('num_')}={value}" for name, value in self.options.items()]
        return " ".join([*flags, *options, *dict.fromkeys(x for x in self.signature.values() if x.startswith("*"))])


def specialised(launch: Launch, module: str) -> Configuration:
    """The configuration that a launch on a card would compile, found out by Triton's own argument binder.

    It marks pointers and whole numbers that are multiples of 16 and makes ones constant. A meta tensor's address is
    its offset in its storage, and storages on a card are aligned to 256 bytes or more, so the marks are the same.
    """
    from triton.backends.compiler import GPUTarget
    from triton.compiler import make_backend
    from triton.runtime.jit import create_function_from_signature

    kernel, backend = launch.kernel, make_backend(GPUTarget("cuda", HOME, 32))
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialisation, options = bind(*launch.arguments, **launch.options)
    _, signature, constexprs, attrs = kernel._pack_args(backend, launch.options, bound, specialisation, options)
    whole = {id(x) for x in launch.arguments if isinstance(x, Tensor) and x.dtype == torch.int8}
    return Configuration(module, kernel.__name__, signature, constexprs, attrs, options, len(whole))


def load(module: str) -> ModuleType:
    """A module by its import name, or a file by its path."""
    if not module.endswith(".py"):
        return import_module(module)
    name = Path(module).stem
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, module)
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


def build(configuration: Configuration, capability: int) -> dict[str, Any]:
    """Registers, shared and spilled bytes, operand types of the products asked for and of the instructions used."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    c = configuration
    source = ASTSource(getattr(load(c.module), c.kernel), c.signature, c.constexprs, c.attrs)
    try:
        binary = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=dict(c.options))
    except Exception as error:  # a compiler has many ways to give up, and the others must still be compiled
        return {"error": reason(error)}
    usage = resources(binary.asm["cubin"])
    dots = sorted({"/".join(dict.fromkeys(pair)) for pair in DOT.findall(binary.asm["ttir"])})
    return usage | {
        "shared": binary.metadata.shared,
        "dots": dots,
        "mma": sorted(set(MMA.findall(binary.asm["ptx"]))),
    }


def reason(error: Exception) -> str:
    """Of a compiler's message, the place, the line of code and what went wrong there."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip(" ^")]
    cause = error.__cause__ and (str(error.__cause__).partition("\n")[0] or type(error.__cause__).__name__)
    return f"{type(error).__name__}: {' ... '.join(filter(None, [*lines[:1], *lines[1:][-1:], cause]))}"[:400]


def resources(cubin: bytes) -> dict[str, int]:
    """Registers a thread, and the bytes that a thread spills.

    Triton's kernels keep nothing on the stack by themselves (its base in their ABI is 0 bytes): where there is one,
    and the machine code stores there or loads from there, registers were spilled.
    """
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        said = tool("cuobjdump", "--dump-resource-usage", file.name)
        found = {name: int(value) for name, value in re.findall(r"\b(REG|STACK):(\d+)", said)}
        touched = found["STACK"] and re.search(r"\b(STL|LDL)\b", tool("nvdisasm", "-c", file.name))
    return {"registers": found["REG"], "spilled": found["STACK"] if touched else 0}


def tool(name: str, *arguments: str) -> str:
    """What one of the CUDA tools that come with Triton prints."""
    import triton

    path = getattr(triton.knobs.nvidia, name).path
    return subprocess.run([path, *arguments], capture_output=True, text=True, check=True).stdout
