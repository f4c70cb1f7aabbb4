"""What the driver and the kernel of the system say of a card and of a process, asked from outside while it runs.

NVML is reached by the package nvidia-ml-py, which is optional: where it is missing, or does not list the process (as
in containers), its figure is not measured and the reason is told. It knows the lists of processes, whose records differ
between drivers; the one number that the engine asks for it asks without a package (engine/nvml.py). No code here makes
a CUDA context.
"""

import contextlib
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from unipic_run.engine.errors import UsageError

EVERY = 0.02  # seconds between two looks
UNLISTED = 2**30  # bytes of a card in use by nobody whom the driver lists, which are too many; heuristic
MIB = 2**20
ASK = """import json, torch
card = torch.cuda.get_device_properties(0)
print(json.dumps({"name": card.name, "uuid": str(card.uuid), "total_bytes": card.total_memory}))"""


def the_card() -> dict[str, Any]:
    """name, uuid, total_bytes of the first card, told by a process that then ends and leaves nothing on it."""
    done = subprocess.run([sys.executable, "-c", ASK], capture_output=True, text=True, timeout=120)
    if done.returncode:
        raise UsageError(f"the GPU does not answer ({last_line(done.stderr)})", "see `unipic-run doctor`")
    return json.loads(done.stdout.splitlines()[-1])


class Driver:
    """NVML's view of one card; `missing` says why there is none."""

    def __init__(self, uuid: str) -> None:
        self.uuid, self.missing, self.nvml = f"GPU-{uuid.removeprefix('GPU-')}", "", None
        self.known: set[int] = set()  # processes on the card that are put up with
        try:
            import pynvml
        except ImportError:
            self.missing = "nvidia-ml-py is not installed (install unipic-run[bench])"
            return
        try:
            pynvml.nvmlInit()
            self.card = pynvml.nvmlDeviceGetHandleByUUID(self.uuid)
        except pynvml.NVMLError as error:
            self.missing = f"NVML does not answer ({error})"
            return
        self.nvml = pynvml

    def processes(self) -> dict[int, int | None]:
        """Bytes of the card by process id, None where the driver does not tell."""
        found: dict[int, int | None] = {}
        for ask in (self.nvml.nvmlDeviceGetComputeRunningProcesses, self.nvml.nvmlDeviceGetGraphicsRunningProcesses):
            with contextlib.suppress(self.nvml.NVMLError):
                for process in ask(self.card):  # one that does both is listed twice
                    found[process.pid] = process.usedGpuMemory or found.get(process.pid)
        return found

    def others(self) -> list[str]:
        """Who uses the card, each as a phrase."""
        if self.nvml is None:
            return self._others_by_command()
        listed = self.processes()
        said = [f"pid {pid} {self._name(pid)} {(used or 0) // MIB} MiB" for pid, used in sorted(listed.items())]
        with contextlib.suppress(self.nvml.NVMLError):
            used = self.nvml.nvmlDeviceGetMemoryInfo(self.card).used
            if not said and used > UNLISTED:
                said.append(f"{used // MIB} MiB by processes that the driver does not list here")
        return said

    def _name(self, pid: int) -> str:
        try:
            name = self.nvml.nvmlSystemGetProcessName(pid)
        except self.nvml.NVMLError:
            return "?"
        return (name.decode(errors="replace") if isinstance(name, bytes) else name).rpartition("/")[2]

    def _others_by_command(self) -> list[str]:
        """By nvidia-smi, which lists those that compute; nobody where it is missing too."""
        what = "--query-compute-apps=pid,process_name,used_memory"
        command = ["nvidia-smi", f"--id={self.uuid}", what, "--format=csv,noheader"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=20)
        except (OSError, subprocess.SubprocessError):
            return []
        return [f"pid {line.strip()}" for line in done.stdout.splitlines() if line.strip() and not done.returncode]


def require_alone(driver: Driver, shared: bool = False) -> None:
    """Raises UsageError where other processes use the card; those that do are put up with if it is `shared`."""
    if shared:
        driver.known = set(driver.processes()) if driver.nvml else set()
    elif others := driver.others():
        what = f"the GPU is in use ({'; '.join(others)}), and a measurement needs it alone"
        raise UsageError(what, "end those, or measure all the same with --shared")


@dataclass
class Seen:
    """Peaks of one process in bytes, None where they were not measured."""

    nvml_bytes: int | None = None
    nvml_missing: str = ""  # why not
    host_bytes: int | None = None  # of memory that is its own or shared, not of files that are mapped
    strangers: set[int] = field(default_factory=set)  # other processes on the card


@dataclass(frozen=True)
class Done:
    status: int | None  # None: it took too long and was ended
    stdout: str
    stderr: str
    seen: Seen


def run_watched(command: Sequence[str], driver: Driver | None, limit: float) -> Done:
    """Run a command for at most `limit` seconds and look at it all the while."""
    seen = Seen(nvml_missing=driver.missing if driver else "")
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        process, end = subprocess.Popen(command, stdout=out, stderr=err, text=True), time.monotonic() + limit
        try:
            while (status := process.poll()) is None and time.monotonic() < end:
                look(process.pid, driver, seen)
                time.sleep(EVERY)
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
        if driver and seen.nvml_bytes is None and not seen.nvml_missing:
            seen.nvml_missing = "NVML does not list the process, or not its memory (as in containers)"
        out.seek(0)
        err.seek(0)
        return Done(status, out.read(), err.read(), seen)


def look(pid: int, driver: Driver | None, seen: Seen) -> None:
    host = host_bytes(pid)
    if host is not None:
        seen.host_bytes = max(host, seen.host_bytes or 0)
    if driver is None or driver.nvml is None:
        return
    listed = driver.processes()
    if pid in listed:  # else the driver counts other processes than we do
        seen.strangers |= listed.keys() - {pid} - driver.known
        if listed[pid] is not None:
            seen.nvml_bytes = max(listed[pid], seen.nvml_bytes or 0)


def host_bytes(pid: int) -> int | None:
    """Resident memory that no file backs, pinned memory as far as the system counts it; None where it tells nothing."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text("utf-8").splitlines()
    except OSError:
        return None
    fields = dict(line.split(":", 1) for line in lines if ":" in line)
    found = [int(fields[name].split()[0]) * 1024 for name in ("RssAnon", "RssShmem") if name in fields]
    return sum(found) if found else None


def last_json(text: str) -> Any:
    """The whole text as JSON, else its last line, else None."""
    for candidate in (text, (text.strip().splitlines() or [""])[-1]):
        try:
            return json.loads(candidate)
        except ValueError:
            continue
    return None


def last_line(text: str) -> str:
    return (text.strip().splitlines() or ["no message"])[-1][:500]
