"""The installed program: terminals, pipes, signals, streams that are full or closed."""

import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
from PIL import Image
from unipic_run.cli import main


def test_a_closed_stdout_is_told_before_the_work(run, model, monkeypatch, capsys, quick):
    monkeypatch.setattr(sys, "stdout", None)
    assert main(["gen", "x", "-m", model, *quick, "-o", "-"]) == 2
    assert "stdout is closed" in capsys.readouterr().err


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
def test_a_terminal_sees_rounds_and_the_time_left(model, command):
    import pty

    main_end, terminal_end = pty.openpty()
    arguments = [command, "gen", "x", "-m", model, "--steps", "24", "--seed", "7", "--res", "128"]
    environment = os.environ | {"TERM": "xterm", "COLUMNS": "120"}
    done = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=terminal_end, env=environment)
    os.close(terminal_end)
    seen = b""
    with suppress(OSError):  # what Linux reports when the other end is closed
        while piece := os.read(main_end, 4096):
            seen += piece
    os.close(main_end)
    assert done.communicate()[0] == b"x-7.png\n" and done.returncode == 0
    # Which rounds are seen depends on how often the bar is drawn; the time left is a dash until it is known.
    assert re.search(rb"round \d+ of 24", seen) and re.search(rb"(\d|-):(\d\d|--):(\d\d|--)", seen)


def test_the_installed_command_writes_png_bytes_to_a_pipe(model, command, quick):
    done = subprocess.run([command, "gen", "x", "-m", model, *quick, "-o", "-"], capture_output=True, timeout=120)
    assert done.returncode == 0 and done.stderr == b""
    with Image.open(io.BytesIO(done.stdout)) as image:
        assert image.size == (128, 128)


def interruptible(arguments):
    """A process that hears of SIGINT, which shells let their background jobs ignore."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(arguments, **pipes, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGINT between processes")
def test_ctrl_c_stops_within_a_round_and_keeps_what_was_finished(model, tmp_path, command, pixels, pngs):
    arguments = [command, "gen", "x", "-m", model, "--seed", "1", "-n", "500", "--steps", "4", "--json"]
    process = interruptible(arguments)
    deadline = time.monotonic() + 60
    while not pngs() and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=20)
    assert process.returncode == 130 and err == "error: cancelled\n"
    found = json.loads(out)
    assert found["error"]["code"] == "cancelled" and {row["path"] for row in found["images"]} <= set(pngs())
    assert len(pngs()) - len(found["images"]) in (0, 1)  # the signal may fall between a picture and its entry
    assert all(pixels(name).any() for name in pngs())
    assert not list(tmp_path.glob(".*partial*"))


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGINT between processes")
def test_ctrl_c_in_the_first_picture_leaves_nothing(model, command, pngs):
    arguments = [command, "gen", "x", "-m", model, "--steps", "10000", "--size", "512x512", "-o", "{seed}.png"]
    process = interruptible(arguments)
    assert process.stderr.readline().startswith("note: 512x512")  # the engine has begun
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=20)
    assert (process.returncode, out, err) == (130, "", "error: cancelled\n") and not pngs()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
@pytest.mark.parametrize(
    ("streams", "code", "told"),
    [
        ("2>&-", 0, ""),
        ("2>/dev/full", 0, ""),
        (">&-", 0, ""),
        (">/dev/full", 2, "error: stdout cannot be written (No space left on device): make room"),
    ],
)
def test_pictures_are_saved_whether_or_not_somebody_hears_of_them(model, streams, code, told, command, pngs):
    words = [command, "gen", "x", "-m", model, "--steps", "1", "--res", "32", "-n", "2", "-o", "a.png"]
    done = subprocess.run(["sh", "-c", f'"$@" {streams}', "sh", *words], capture_output=True, text=True, timeout=300)
    assert done.returncode == code and pngs() == ["a-1.png", "a-2.png"]
    assert told in done.stderr and "Traceback" not in done.stderr and done.stderr.count("\n") <= 2, "a note, an error"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_what_stdout_cannot_take_is_one_line(tmp_path, command):
    for words in (["list", "--json"], ["list"]):
        done = subprocess.run(["sh", "-c", '"$@" >/dev/full', "sh", command, *words], capture_output=True, text=True)
        assert done.returncode == 2 and done.stderr.startswith("error: stdout cannot be written")
        assert done.stderr.count("\n") == 1


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGPIPE")
def test_a_reader_that_goes_away_is_no_news(command):
    process = subprocess.Popen([command, "list"], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    assert process.stderr.read() == b"" and process.wait(60) == 141
