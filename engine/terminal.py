"""What a run of the command shows: data on stdout, progress and remarks on stderr, and how it ended as an exit code.

With `json` all data waits for one object at the end, which also comes when the run failed or was cancelled. Nobody has
to hear a remark: where stderr cannot be written, the work goes on.
"""

import json
import os
import sys
import traceback
import unicodedata
import warnings
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO

from .errors import OutputError, UnipicError, UnipicWarning

BROKEN_PIPE = 141  # what a shell reports of a program that SIGPIPE ended
MAX_LINE = 2000  # characters of a message; a prompt inside it may be 100 kB long


class Terminal:
    """One run of the command. A context manager: it takes over warnings, and at the end clears its progress bar and
    lets go what could not be written.
    """

    def __init__(self, json: bool = False, debug: bool = False) -> None:
        self.json, self.debug, self.quiet = json, debug, False
        self.data: dict[str, Any] = {}  # the object of `--json`
        self._bar: Bar | None = None
        self._noted: set[str] = set()
        self._in_line, self._waiting = False, []  # notes wait for the end of a line that comes in pieces

    def __enter__(self) -> "Terminal":
        sys.stdout, sys.stderr = sys.stdout or _nowhere(), sys.stderr or _nowhere()
        for stream in (sys.stdout, sys.stderr):
            with suppress(AttributeError, ValueError):  # a test's stream, or a closed one
                # A file name may hold bytes that are no text; a console may lack characters that a prompt holds.
                utf8 = (stream.encoding or "").lower().replace("-", "") == "utf8"
                stream.reconfigure(errors="surrogateescape" if utf8 else "backslashreplace")
        self._warnings = warnings.catch_warnings()
        self._warnings.__enter__()
        if not self.debug:
            warnings.simplefilter("ignore")
        warnings.filterwarnings("always", category=UnipicWarning)
        warnings.filterwarnings("always", message="the kernels? ")  # a KernelWarning; its class is torch away
        warnings.showwarning = lambda message, *where, **options: self.note(str(message))
        return self

    def __exit__(self, *exc: object) -> None:
        self.clear()
        self._warnings.__exit__(None, None, None)
        for stream in (sys.stdout, sys.stderr):
            _let_go(stream)

    def line(self, text: str) -> None:
        """A line of data, at once; nothing with `json`."""
        self.piece(text + "\n")

    def piece(self, text: str) -> None:
        """A part of a line, as it comes. Raises OutputError, and BrokenPipeError when its reader has gone."""
        if not self.json:
            self.clear()
            self._put(printable(text) if sys.stdout.isatty() else text)

    def stream(self, pieces: Iterator[str]) -> None:
        """One line of data in pieces; ended also when the work is not."""
        try:
            for piece in pieces:
                self.piece(piece)
                self._in_line = self._in_line or bool(piece)
        finally:
            if self._in_line:
                self._in_line = False
                self.line("")
            waiting, self._waiting = self._waiting, []
            for sentence in waiting:
                self.tell(f"note: {sentence}")

    def note(self, sentence: str) -> None:
        """A remark that does not stop the work, each one once; errors alone are shown with `quiet`."""
        if sentence not in self._noted and not self.quiet:
            self._noted.add(sentence)
            if self._in_line:
                self._waiting.append(sentence)
            else:
                self.tell(f"note: {sentence}")

    def say(self, sentence: str) -> None:
        """What happens next, before something slow."""
        if not self.quiet:
            self.tell(sentence)

    def progress(self, doing: str, done: int, total: int) -> None:
        """Bytes done of all; the bar goes when they are."""
        if done >= total:
            self.clear()
        else:
            self.show(doing, done, total, f"{done / 1e9:.2f} of {gigabytes(total)}")

    def show(self, what: str, done: int, total: int, text: str) -> None:
        """Move the bar, if stderr is a terminal that wants one."""
        if self.quiet or not sys.stderr.isatty():
            return
        self._bar = self._bar or Bar()
        self._bar.show(what, done, total, text)

    def clear(self) -> None:
        """Take the bar away, so that a line can be written where it was."""
        if self._bar:
            self._bar.hide()

    def run(self, work: Callable[[], int]) -> int:
        """Do the work and tell how it ended; returns the exit code."""
        try:
            code = work()
            self._put(self._object() if self.json and self.data else "")  # help was written, but not all of it at once
            return code
        except KeyboardInterrupt:
            return self._failed("cancelled", "cancelled", "", 130)
        except BrokenPipeError:
            return BROKEN_PIPE
        except UnipicError as error:
            if isinstance(error.__cause__, BrokenPipeError):
                return BROKEN_PIPE
            return self._failed(error.code, error.what, error.remedy, error.exit_code)
        except OSError as error:
            if error.filename is None:
                return self._internal(error)
            what = f"{os.fspath(error.filename)!r:.500} cannot be used ({error.strerror})"
            return self._failed("usage", what, "check the path and its permissions", 2)
        except Exception as error:
            return self._internal(error)

    def _internal(self, error: Exception) -> int:
        what, remedy = f"{type(error).__name__}: {error}", "run with --debug for the traceback"
        return self._failed("internal", what, "" if self.debug else remedy, 1)

    def _failed(self, code: str, what: str, remedy: str, exit_code: int) -> int:
        """One line on stderr, and with `json` an object; what was finished before stays in it."""
        self.data["error"] = {"code": code, "message": what, "remedy": remedy}
        if self.debug:
            with suppress(OSError):
                traceback.print_exc()
        self.tell(f"error: {what}" + (f": {remedy}" if remedy else ""))
        if self.json:
            with suppress(OSError):
                self._put(self._object())
        return exit_code

    def _object(self) -> str:
        return json.dumps(self.data, default=str) + "\n"

    def _put(self, text: str) -> None:
        """All of stdout up to here, at once."""
        try:
            sys.stdout.write(text)
            sys.stdout.flush()
        except BrokenPipeError:
            raise
        except OSError as error:
            what = f"stdout cannot be written ({error.strerror or error})"
            raise OutputError(what, "make room, or send it elsewhere") from error

    def tell(self, text: str) -> None:
        """A line on stderr, also with `quiet`: an error, or what would be lost otherwise."""
        self.clear()
        short = text if len(text) <= MAX_LINE else f"{text[: MAX_LINE // 2]} ... {text[-MAX_LINE // 2 :]}"
        with suppress(OSError):
            print(printable(" ".join(short.splitlines())), file=sys.stderr, flush=True)


class Bar:
    """One line on stderr: what is done, a bar, how far it is, the time left."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[text]}"))
        # Redirecting would send data that belongs on stdout to stderr.
        self.progress = Progress(
            *columns,
            TimeRemainingColumn(),
            console=Console(file=sys.stderr),
            transient=True,
            redirect_stdout=False,
            redirect_stderr=False,
        )
        self.what, self.task, self.shown = "", None, False

    def show(self, what: str, done: int, total: int, text: str) -> None:
        if what != self.what:
            if self.task is not None:
                self.progress.remove_task(self.task)
            self.what, self.task = what, self.progress.add_task(what, total=total, text=text)
        if not self.shown:
            self.progress.start()
            self.shown = True
        self.progress.update(self.task, completed=done, total=total, text=text)

    def hide(self) -> None:
        if self.shown:
            self.progress.stop()
            self.shown = False


def _nowhere() -> TextIO:
    """In place of a stream that whoever started us has closed."""
    return Path(os.devnull).open("w", encoding="utf-8")


def _let_go(stream: TextIO) -> None:
    """Rather than let Python fail at exit on what could not be written."""
    try:
        stream.flush()
    except (OSError, ValueError):
        with suppress(OSError, ValueError):
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, stream.fileno())
            os.close(null)


def printable(text: str) -> str:
    """Without what a terminal would obey: text of a file or a model may hold escape sequences."""
    return "".join(
        char if char in "\n\t" or unicodedata.category(char) != "Cc" else f"\\x{ord(char):02x}" for char in text
    )


def gigabytes(nbytes: int) -> str:
    return f"{nbytes / 1e9:.2f} GB"


def terminal_of(context: Any, as_json: bool, quiet: bool = False) -> Terminal:
    """The terminal of a command's typer context, set to what the command was asked."""
    terminal = context.find_object(Terminal)
    terminal.json, terminal.quiet = as_json, quiet
    return terminal
