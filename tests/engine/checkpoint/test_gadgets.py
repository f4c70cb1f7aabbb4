"""Pickles that run code when they are unpickled. Here each must be refused by name, and run nothing."""

import ast
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import unipic_run
from unipic_run.engine.checkpoint.pickle_reader import TorchCheckpoint
from unipic_run.engine.errors import CorruptWeightsError

SYSTEM = ("posix", "system")


def gadgets(pk, canary: str) -> dict[str, bytes]:
    """Name -> opcodes that would leave an object on the stack after touching `canary`."""
    shell = pk.text(f"touch {canary}")
    code = pk.text(f"open({canary!r}, 'w').close()")
    run = pk.call(*SYSTEM, shell)
    nested = b"\x80\x02" + run + b"."
    data = b"C" + bytes([len(nested)]) + nested  # SHORT_BINBYTES
    instance = pk.name("collections", "OrderedDict") + b")\x81"
    return {
        "os.system": pk.call("os", "system", shell),
        "posix.system": run,
        "nt.system": pk.call("nt", "system", shell),
        "subprocess.Popen": pk.call("subprocess", "Popen", b"](" + pk.text("touch") + pk.text(canary) + b"e"),
        "subprocess.check_output": pk.call("subprocess", "check_output", pk.text("touch")),
        "builtins.eval": pk.call("builtins", "eval", code),
        "builtins.exec": pk.call("builtins", "exec", code),
        "builtins.compile": pk.call("builtins", "compile", code, pk.text("x"), pk.text("exec")),
        "builtins.getattr": pk.call("builtins", "getattr", pk.name("os", "path"), pk.text("os")),
        "builtins.__import__": pk.call("builtins", "__import__", pk.text("os")),
        "builtins.map": pk.call("builtins", "map", pk.name(*SYSTEM), b"](" + shell + b"e"),
        "builtins.open": pk.call("builtins", "open", pk.text(canary), pk.text("w")),
        "importlib.import_module": pk.call("importlib", "import_module", pk.text("antigravity")),
        "runpy.run_path": pk.call("runpy", "run_path", pk.text(canary)),
        "runpy._run_code": pk.call("runpy", "_run_code", code, b"}"),
        "pickle.loads": pk.call("pickle", "loads", data),
        "_pickle.loads": pk.call("_pickle", "loads", data),
        "marshal.loads": pk.call("marshal", "loads", data),
        "torch.load": pk.call("torch", "load", pk.text(canary)),
        "torch.storage._load_from_bytes": pk.call("torch.storage", "_load_from_bytes", data),
        "torch.hub.load": pk.call("torch.hub", "load", pk.text("a/b"), pk.text("c")),
        "torch._utils._rebuild_sparse_tensor": pk.call("torch._utils", "_rebuild_sparse_tensor", b"N", b"N"),
        "torch.UntypedStorage": pk.call("torch", "UntypedStorage", pk.number(2**40)),
        "numpy builtins": pk.call("numpy.core.multiarray", "__builtins__"),
        "numpy.runstring": pk.call("numpy.testing._private.utils", "runstring", code, b"}"),
        "ctypes.CDLL": pk.call("ctypes", "CDLL", pk.text("libc.so.6")),
        "functools.partial": pk.call("functools", "partial", pk.name(*SYSTEM), shell) + b")R",
        "functools.reduce": pk.call("functools", "reduce", pk.name(*SYSTEM), b"](" + shell + b"e"),
        "operator.attrgetter": pk.call("operator", "attrgetter", pk.text("system")),
        "operator.methodcaller": pk.call("operator", "methodcaller", pk.text("system"), shell),
        "webbrowser.open": pk.call("webbrowser", "open", pk.text("file:///")),
        "codecs.decode": pk.call("codecs", "decode", code, pk.text("rot13")),
        "_codecs.encode": pk.call("_codecs", "encode", pk.text("x"), pk.text("latin1")),
        "pty.spawn": pk.call("pty", "spawn", shell),
        "timeit.timeit": pk.call("timeit", "timeit", code),
        "shutil.rmtree": pk.call("shutil", "rmtree", pk.text(canary)),
        "pip main": pk.call("pip._internal", "main", b"]"),
        "call of a storage class": pk.call("torch", "FloatStorage", pk.number(2**40)),
        "call of a string": pk.text("os.system") + pk.tuple(shell) + b"R",
        "OrderedDict with arguments": pk.call("collections", "OrderedDict", b"]"),
        "dotted name": pk.call("torch._utils", "_rebuild_tensor_v2.__globals__", shell),
        "state set on a tensor": pk.tensor() + b"}" + b"b",
        "state set on a name": pk.name("collections", "OrderedDict") + b"}" + b"b",
        "state that is a tuple": pk.call("collections", "OrderedDict") + b"}}\x86b",
        "new object": instance,
        "new object with keywords": pk.name("os", "system") + b")}\x92",
        "INST": b"(" + shell + b"ios\nsystem\n",
        "OBJ": b"(" + pk.name(*SYSTEM) + shell + b"o",
        "STACK_GLOBAL": pk.text("os") + pk.text("system") + b"\x93" + pk.tuple(shell) + b"R",
        "STACK_GLOBAL of a number": pk.number(1) + pk.text("system") + b"\x93",
        "EXT1": b"\x82\x01",
        "EXT2": b"\x83\x01\x00",
        "EXT4": b"\x84\x01\x00\x00\x00",
        "text PERSID": b"Pstorage\n",
        "PERSID of a string": pk.text("storage") + b"Q",
        "PERSID of another kind": pk.tuple(pk.text("module"), pk.name("torch", "FloatStorage")) + b"Q",
        "out-of-band buffer": b"\x97",
        "bytearray": b"\x96" + (4).to_bytes(8, "little") + b"abcd",
    }


def test_every_gadget_is_refused_and_runs_nothing(pk, torch_zip, tmp_path):
    canary = tmp_path / "canary"
    found = gadgets(pk, str(canary))
    assert len(found) >= 50
    for name, opcodes in found.items():
        path = torch_zip(pk.dict(w=opcodes), {"0": bytes(8)})
        with pytest.raises(CorruptWeightsError):
            TorchCheckpoint(path)
            pytest.fail(f"{name} was read")
        assert not canary.exists(), name


@pytest.mark.parametrize(
    "name", ["os.system", "subprocess.Popen", "builtins.eval", "functools.partial", "STACK_GLOBAL"]
)
def test_the_refusal_names_the_function(pk, torch_zip, name):
    path = torch_zip(pk.dict(w=gadgets(pk, "/nowhere")[name]))
    with pytest.raises(CorruptWeightsError, match="os.system" if name == "STACK_GLOBAL" else name):
        TorchCheckpoint(path)


def test_the_canary_would_have_been_touched(pk, tmp_path):
    """The control: the same bytes do run under pickle, so their refusal above means something."""
    canary = tmp_path / "canary"
    payload = b"\x80\x02" + gadgets(pk, str(canary))["builtins.eval"] + b"."
    pickle.loads(payload)
    assert canary.exists()


def test_reading_a_gadget_imports_no_module(pk, torch_zip):
    path = torch_zip(pk.dict(w=pk.call("antigravity", "x")))
    code = f"""
import sys
from pathlib import Path
from unipic_run.engine.checkpoint.pickle_reader import TorchCheckpoint
before = set(sys.modules)
try: TorchCheckpoint(Path({str(path)!r}))
except Exception as error: print(type(error).__name__)
print(sorted(set(sys.modules) - before))
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.split("\n")[:2] == ["CorruptWeightsError", "[]"]


def test_the_package_unpickles_nowhere():
    """No call or import of anything that unpickles or evaluates, in any module that ships."""
    root = Path(unipic_run.__file__).parent
    bad_calls = {"torch.load", "pickle.load", "pickle.loads", "eval", "exec", "numpy.load", "np.load", "joblib.load"}
    bad_modules = {"pickle", "_pickle", "cPickle", "dill", "cloudpickle", "shelve", "marshal", "joblib"}
    folders = ("engine", "kernels", "quant", "bench", "pocket")
    sources = [*root.glob("*.py"), *(path for folder in folders for path in (root / folder).rglob("*.py"))]
    assert len(sources) > 20
    for path in sources:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                assert ast.unparse(node.func) not in bad_calls, f"{path}:{node.lineno}"
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
            assert not bad_modules & {name.split(".")[0] for name in names}, f"{path}:{node.lineno}"
            if isinstance(node, ast.keyword):
                assert node.arg not in ("trust_remote_code", "allow_pickle"), f"{path}:{node.lineno}"
