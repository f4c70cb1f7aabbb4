"""The directory of a zip file, strictly: stored entries inside the file, no overlap, bounded counts and names.

The standard library's reader forgives prefixes, comments and doubled names, and builds an object per entry before we
could count them. Torch writes none of these, so this reader refuses them. (zip format: PKWARE APPNOTE 6.3)
"""

import itertools
import struct
from typing import BinaryIO

from ..errors import CorruptWeightsError

MAX_ENTRIES = 65_536
MAX_NAME = 1_024

_END = struct.Struct("<4s4H2LH")  # end of central directory
_END64_LOCATOR = struct.Struct("<4sLQL")
_END64 = struct.Struct("<4sQ2H2L4Q")
_CENTRAL = struct.Struct("<4s6H3L5H2L")
_LOCAL = struct.Struct("<4s5H3L2H")
_FULL16, _FULL32 = 0xFFFF, 0xFFFFFFFF


def stored_entries(file: BinaryIO) -> dict[str, tuple[int, int]]:
    """Entry name -> (offset of its bytes in the file, length in bytes). Raises CorruptWeightsError."""
    size = file.seek(0, 2)
    count, start, length = _end_of_directory(file, size)
    table = _read(file, start, length, "the directory")
    spans: list[tuple[int, int]] = []
    entries: dict[str, tuple[int, int]] = {}
    at = 0
    for _ in range(count):
        at, name, header, nbytes = _central_entry(table, at)
        if name in entries:
            raise _broken(f"entry {name!r} appears twice")
        local = _read(file, header, _LOCAL.size, f"the header of {name!r}")
        magic, *_rest, name_length, extra_length = _LOCAL.unpack(local)
        if magic != b"PK\x03\x04":
            raise _broken(f"entry {name!r} has no header at byte {header}")
        if _read(file, header + _LOCAL.size, name_length, f"the header of {name!r}") != name.encode():
            raise _broken(f"entry {name!r} is named differently in its own header")
        offset = header + _LOCAL.size + name_length + extra_length
        if offset + nbytes > start:
            raise _broken(f"entry {name!r} ends at byte {offset + nbytes}, past the last data byte {start}")
        spans.append((header, offset + nbytes))
        entries[name] = (offset, nbytes)
    if at != length:
        raise _broken(f"the directory has {length - at} bytes too many")
    spans.sort()
    for (_, end), (begin, _) in itertools.pairwise(spans):
        if begin < end:
            raise _broken(f"two entries overlap at byte {begin}")
    return entries


def _end_of_directory(file: BinaryIO, size: int) -> tuple[int, int, int]:
    """(number of entries, first byte, length) of the central directory, zip64 or not."""
    at = size - _END.size
    magic, disk, disk2, here, count, length, start, comment = _END.unpack(_read(file, at, _END.size, "the end record"))
    if magic != b"PK\x05\x06" or comment or disk or disk2 or here != count:
        raise _broken("the file does not end with a zip directory")
    if count == _FULL16 or length == _FULL32 or start == _FULL32:
        locator = _read(file, at - _END64_LOCATOR.size, _END64_LOCATOR.size, "the zip64 locator")
        magic, _, at, _ = _END64_LOCATOR.unpack(locator)
        if magic != b"PK\x06\x07":
            raise _broken("the zip64 locator is missing")
        record = _END64.unpack(_read(file, at, _END64.size, "the zip64 end record"))
        magic, (count, length, start) = record[0], record[-3:]
        if magic != b"PK\x06\x06":
            raise _broken("the zip64 end record is missing")
    if count > MAX_ENTRIES:
        raise _broken(f"{count} entries, more than {MAX_ENTRIES}")
    if start + length > at or length > count * (_CENTRAL.size + MAX_NAME + 256):
        raise _broken(f"a directory of {length} bytes at byte {start} cannot be right")
    return count, start, length


def _central_entry(table: bytes, at: int) -> tuple[int, str, int, int]:
    """(position of the next record, name, offset of the local header, length in bytes)."""
    if at + _CENTRAL.size > len(table):
        raise _broken("the directory ends early")
    fields = _CENTRAL.unpack_from(table, at)
    magic, flags, method, packed, nbytes = fields[0], fields[3], fields[4], fields[8], fields[9]
    name_length, extra_length, comment_length, header = fields[10], fields[11], fields[12], fields[16]
    at += _CENTRAL.size
    raw = table[at : at + name_length]
    extra = table[at + name_length : at + name_length + extra_length]
    at += name_length + extra_length + comment_length
    if magic != b"PK\x01\x02" or at > len(table) or not 0 < name_length <= MAX_NAME:
        raise _broken("a directory record is damaged")
    try:
        name = raw.decode()
    except UnicodeDecodeError:
        raise _broken(f"entry name {raw[:40]!r} is not UTF-8") from None
    nbytes, packed, header = _zip64_fields(extra, nbytes, packed, header)
    if method != 0 or packed != nbytes or flags & 1:
        raise _broken(f"entry {name!r} is compressed or encrypted; weight files store their bytes as they are")
    return at, name, header, nbytes


def _zip64_fields(extra: bytes, *values: int) -> list[int]:
    """`values` with each 32-bit placeholder replaced by its 64-bit field, which come in this very order."""
    wide: list[int] = []
    while len(extra) >= 4:
        kind, length = struct.unpack_from("<HH", extra)
        if kind == 1:
            field = extra[4 : 4 + length]
            wide = [value for (value,) in struct.iter_unpack("<Q", field[: len(field) // 8 * 8])]
        extra = extra[4 + length :]
    result = []
    for value in values:
        if value == _FULL32:
            if not wide:
                raise _broken("a 64-bit size is missing from the directory")
            value = wide.pop(0)
        result.append(value)
    return result


def _read(file: BinaryIO, at: int, length: int, what: str) -> bytes:
    if at < 0:
        raise _broken(f"the file is too short to hold {what}")
    try:
        file.seek(at)
        data = file.read(length)
    except (OSError, OverflowError, ValueError):  # offsets that no file can have
        raise _broken(f"{what} would lie at byte {at}") from None
    if len(data) != length:
        raise _broken(f"the file ends inside {what}")
    return data


def _broken(what: str) -> CorruptWeightsError:
    return CorruptWeightsError(f"not a complete torch zip file: {what}", "download the file again")
