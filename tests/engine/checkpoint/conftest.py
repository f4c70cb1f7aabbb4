"""Builders of torch zip files, byte by byte where a test needs bytes that torch would never write."""

import io
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

TINY = Path(__file__).parents[2] / "data" / "unipic-tiny"


@pytest.fixture
def tiny() -> Path:
    """A released UniPic folder with small random weights. Read only."""
    return TINY


@pytest.fixture
def torch_zip(tmp_path: Path) -> Callable[..., Path]:
    """(pickle, storages, more entries, method) -> a checkpoint file with them."""

    def build(
        pickle: bytes,
        storages: dict[str, bytes] | None = None,
        more: dict[str, bytes] | None = None,
        method: int = zipfile.ZIP_STORED,
    ) -> Path:
        entries = {"x/data.pkl": pickle, "x/byteorder": b"little"}
        entries |= {f"x/data/{key}": data for key, data in (storages or {}).items()} | (more or {})
        memory = io.BytesIO()
        with zipfile.ZipFile(memory, "w", method) as archive:
            for name, data in entries.items():
                archive.writestr(name, data)
        path = tmp_path / "hostile.bin"
        path.write_bytes(memory.getvalue())
        return path

    return build


class Pickle:
    """Pickle opcodes as bytes."""

    @staticmethod
    def text(value: str) -> bytes:
        return b"X" + len(value.encode()).to_bytes(4, "little") + value.encode()

    @staticmethod
    def number(value: int) -> bytes:
        return b"\x8a\x09" + value.to_bytes(9, "little", signed=True)

    @staticmethod
    def name(module: str, name: str) -> bytes:
        return f"c{module}\n{name}\n".encode()

    @staticmethod
    def tuple(*items: bytes) -> bytes:
        return b"(" + b"".join(items) + b"t"

    @classmethod
    def call(cls, module: str, name: str, *args: bytes) -> bytes:
        return cls.name(module, name) + cls.tuple(*args) + b"R"

    @classmethod
    def tensor(cls, shape=(2,), strides=(1,), offset=0, numel=2, key="0", kind="FloatStorage") -> bytes:
        storage = cls.tuple(
            cls.text("storage"), cls.name("torch", kind), cls.text(key), cls.text("cpu"), cls.number(numel)
        )
        sizes = [cls.tuple(*map(cls.number, values)) for values in (shape, strides)]
        hooks = cls.call("collections", "OrderedDict")
        return cls.call(
            "torch._utils", "_rebuild_tensor_v2", storage + b"Q", cls.number(offset), *sizes, b"\x89", hooks
        )

    @classmethod
    def dict(cls, **values: bytes) -> bytes:
        """A whole pickle: a dict of these values."""
        return b"\x80\x02}(" + b"".join(cls.text(key) + value for key, value in values.items()) + b"u."


@pytest.fixture
def pk() -> type[Pickle]:
    return Pickle
