"""What happens where kernels cannot be had: torch, one line for all that fail alike; and a device's failures stay."""

import os
import subprocess
import sys
import warnings
from itertools import count

import pytest
import torch
from unipic_run.engine.terminal import Terminal
from unipic_run.kernels import _op
from unipic_run.kernels._failure import KernelWarning
from unipic_run.kernels._op import HAS_TRITON, OPERATORS, Cost, Operator, launch

NUMBER = count()
NO_COMPILER = RuntimeError("Failed to find C compiler. Please specify via CC environment variable or set ...")
FAILED_COMPILER = [subprocess.CalledProcessError(1, ["/usr/bin/gcc", f"/tmp/{name}/main.c"]) for name in "ab"]
X = torch.arange(3.0)


class CompilationError(Exception):
    """Of the name that Triton's has."""


class Kernel:
    """Fails instead of being launched."""

    def __init__(self, error):
        self.error, self.launches = error, 0

    def __getitem__(self, grid):
        return self

    def __call__(self, *arguments, **options):
        self.launches += 1
        raise self.error


def planted(error, before=None):
    """An operator whose kernel fails, or whose launcher does with `before`."""

    def launcher(x):
        if before:
            raise before
        launch(kernel, (1,), x)

    kernel, schema = Kernel(error), f"planted_failing_{next(NUMBER)}(Tensor x) -> Tensor"
    operator = Operator(schema, torch=torch.clone, triton=launcher, cost=Cost)
    operator.broken, operator.kernel = "", kernel
    return operator


@pytest.fixture(autouse=True)
def card(monkeypatch):
    """CPU tensors take the way of a card's; what breaks is whole again behind the test."""
    monkeypatch.setattr(_op, "launches", lambda x: True)
    monkeypatch.setattr(_op, "_told", set())
    before = {name: operator.broken for name, operator in OPERATORS.items()}
    yield
    for name in OPERATORS.keys() - before:
        del OPERATORS[name]
    for name, broken in before.items():
        OPERATORS[name].broken = broken


def said(*operators, times=2):
    """The warnings of calls, all of which give what torch gives."""
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        for operator in operators * times:
            assert torch.equal(operator(X), X)
    assert all(issubclass(one.category, KernelWarning) for one in heard)
    return [str(one.message) for one in heard]


@pytest.mark.parametrize("errors", [[NO_COMPILER] * 3, FAILED_COMPILER], ids=["none", "it fails"])
def test_without_a_c_compiler_there_is_one_line_and_no_second_attempt(errors):
    operators = [planted(error) for error in errors]
    (line,) = said(*operators)
    assert "C compiler" in line and "install" in line and "unipic-run doctor" in line and "planted" not in line
    assert [operator.kernel.launches for operator in operators] == [1] + [0] * (len(operators) - 1)
    assert all(operator.broken for operator in OPERATORS.values()), "none can do better"


def test_kernels_that_fail_alike_share_a_line_and_another_reason_has_its_own():
    first, second = (planted(CompilationError(f"at {n}:4:\n  y = x\n  ^\nno such thing")) for n in (3, 9))
    other, fine = planted(ValueError("Cannot make_shape_compatible")), planted(None)
    lines = said(first, second, other)
    assert len(lines) == 2 and first.name in lines[0] and other.name in lines[1]
    assert len(said(planted(RuntimeError("of one kind")), planted(RuntimeError("of another kind")))) == 2
    assert "CompilationError: no such thing" in lines[0] and "doctor" in lines[0]
    assert [x.kernel.launches for x in (first, second, other)] == [1, 1, 1]
    assert not fine.broken, "it has not failed"


def test_a_cache_folder_that_cannot_be_written_is_named():
    (line,) = said(planted(PermissionError(13, "Permission denied", "/root/.triton")), planted(None))
    assert "Permission denied: /root/.triton" in line and "TRITON_CACHE_DIR" in line


@pytest.mark.parametrize("words", ["device kernel image is invalid", "a PTX JIT compilation failed"])
def test_a_kernel_that_the_driver_does_not_take_has_not_run(words):
    (line,) = said(planted(RuntimeError(f"Triton Error [CUDA]: {words}")))
    assert words in line and "driver" in line


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered"),
        RuntimeError("Triton Error [CUDA]: out of memory"),
        RuntimeError("CUDA error: device-side assert triggered\nCUDA kernel errors might be ..."),
        torch.OutOfMemoryError("tried to allocate 2 GiB"),
        getattr(torch, "AcceleratorError", RuntimeError)("CUDA error: unspecified launch failure"),
    ],
    ids=lambda error: str(error).partition("\n")[0],
)
def test_what_the_device_says_is_raised_and_nothing_is_hidden(error, recwarn):
    operator = planted(error)
    with pytest.raises(type(error), match=str(error)[:12].replace("[", r"\[")):
        operator(X)
    assert not operator.broken and not recwarn


def test_a_fault_of_our_own_is_raised():
    operator = planted(None, before=IndexError("a launcher's mistake"))
    with pytest.raises(IndexError, match="mistake"):
        operator(X)
    assert not operator.broken


def test_the_user_sees_one_line(capsys):
    with Terminal():
        for operator in [planted(error) for error in FAILED_COMPILER]:
            operator(X)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("note: the kernels do not run here (the C compiler failed)")


REAL = """
import sys, warnings
import torch, triton, triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from unipic_run.kernels import _op
from unipic_run.kernels._warm_up import WarmUp, launching, warming_up
from unipic_run.kernels.gate import gated_add
from unipic_run.kernels.norms import norm

@triton.jit
def copy(x_ptr, y_ptr, N: tl.constexpr):
    at = tl.arange(0, N)
    tl.store(y_ptr + at, tl.load(x_ptr + at))

def compile_it(n):
    source = ASTSource(copy, {"x_ptr": "*fp32", "y_ptr": "*fp32", "N": "constexpr"}, {(2,): n}, {})
    triton.compile(source, target=GPUTarget("cuda", 89, 32), options={"num_warps": 1})

warm_up, begun = WarmUp(lambda: begun.append(1)), []
with warming_up(warm_up):
    for n in (16, 32, 16):  # the third is on the disk
        with launching():
            compile_it(n)
compile_it(64)  # nobody asks
assert (warm_up.kernels, begun) == (2, [1]) and 0.01 < warm_up.compile < 60, warm_up

_op.launches = lambda x: True
x = torch.randn(2, 8)
with warnings.catch_warnings(record=True) as heard:
    warnings.simplefilter("always")
    for _ in range(2):
        y = norm(x, None, None, None, None, 1e-6, False)
        torch.testing.assert_close(y, torch.nn.functional.layer_norm(x, (8,), eps=1e-6))
        torch.testing.assert_close(gated_add(x, x, x), x + x * x)
print([str(one.message) for one in heard])
assert len(heard) == 1 and "the kernels do not run here" in str(heard[0].message)
"""


@pytest.mark.skipif(not HAS_TRITON or torch.cuda.is_available(), reason="needs triton, and no card that it could use")
def test_real_triton_without_a_card_is_heard_to_compile_and_leaves_the_work_to_torch(tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path / "cache")}
    script = tmp_path / "real.py"  # Triton reads kernels from their file
    script.write_text(REAL)
    command = [sys.executable, str(script)]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


CARD = """
import warnings
import torch, triton, triton.language as tl
from unipic_run.kernels._op import Cost, KernelWarning, Operator, launch
from unipic_run.kernels._warm_up import WarmUp, warming_up
from unipic_run.kernels.norms import norm

warnings.simplefilter("error", KernelWarning)
x, compiled = torch.randn(4, 64, device="cuda"), []
for _ in range(2):
    with warming_up(warm_up := WarmUp()):
        norm(x, None, None, None, None, 1e-6, False)
    compiled.append((warm_up.kernels, warm_up.compile > 0))
assert compiled == [(1, True), (0, False)], compiled

@triton.jit
def wild(x_ptr, y_ptr, far):
    tl.store(y_ptr + far, tl.load(x_ptr))

def launcher(x):
    y = torch.empty_like(x)
    launch(wild, (1,), x, y, 2**40)
    return y

operator = Operator("planted_wild(Tensor x) -> Tensor", torch=torch.clone, triton=launcher, cost=Cost)
try:
    for _ in range(2):  # the second launch hears of what the first did
        operator(x)
        torch.cuda.synchronize()
except Exception as error:
    assert "illegal memory access" in str(error), error
else:
    raise SystemExit("nothing was raised")
assert not operator.broken
"""


@pytest.mark.gpu
def test_on_a_card_what_is_compiled_counts_once_and_a_device_that_fails_is_heard(tmp_path):
    script = tmp_path / "card.py"
    script.write_text(CARD)
    environment = os.environ | {"TRITON_CACHE_DIR": str(tmp_path / "cache")}
    done = subprocess.run([sys.executable, str(script)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
