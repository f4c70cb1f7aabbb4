"""One call at a time, streams that are left open, precision switches of the process, and memory that runs out."""

import threading
import time
import weakref
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from PIL import Image
from unipic_run import Engine
from unipic_run.engine.device import out_of_memory
from unipic_run.engine.errors import BudgetError, HostMemoryError, UsageError
from unipic_run.engine.lock import Closed, Stream
from unipic_run.engine.precision import true_float32
from unipic_run.engine.reading import Reader

QUICK = {"res": 64, "steps": 3}
PHOTO = Image.new("RGB", (40, 30), "orange")
pytestmark = pytest.mark.filterwarnings("ignore::unipic_run.engine.errors.UnipicWarning")


def in_thread(work: Callable[[], object]) -> list[object]:
    """What `work` returned or raised in another thread; fails if it hangs."""
    outcome: list[object] = []

    def run() -> None:
        try:
            outcome.append(work())
        except Exception as error:
            outcome.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(timeout=30)
    assert not thread.is_alive(), "hangs"
    return outcome


def test_abandoned_stream_releases_the_engine(tiny_engine: Engine) -> None:
    for _ in tiny_engine.ask(PHOTO, "what is this?", res=64, stream=True):
        break
    assert tiny_engine.generate("a cat", **QUICK).images


def test_a_call_inside_a_stream_is_refused_instead_of_hanging(tiny_engine: Engine) -> None:
    stream = tiny_engine.ask(PHOTO, "what is this?", res=64, stream=True)
    next(stream)
    with pytest.raises(UsageError, match="busy with a call of the same thread"):
        tiny_engine.generate("a cat", **QUICK)
    stream.close()
    assert tiny_engine.generate("a cat", **QUICK).images


def test_a_stream_may_wander_between_threads(tiny_engine: Engine) -> None:
    stream = tiny_engine.ask(PHOTO, "what is this?", res=64, stream=True)
    next(stream)

    def go_on() -> object:
        next(stream)
        return tiny_engine.generate("a cat", **QUICK)

    (outcome,) = in_thread(go_on)
    assert isinstance(outcome, UsageError), "the thread that read last is the one that would wait for itself"
    stream.close()


def test_threads_take_turns(tiny_engine: Engine) -> None:
    log: list[int] = []

    def work(number: int) -> None:
        tiny_engine.generate("a cat", on_event=lambda event: log.append(number), **QUICK)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(a != b for a, b in pairwise(log)) == 2 and len(log) == 3 * 5


def test_leaving_the_block_ends_open_streams_and_keeps_the_users_error(
    tiny_release: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("UNIPIC_RUN_CACHE", str(tmp_path))
    with pytest.raises(ZeroDivisionError), Engine.from_pretrained(tiny_release, device="cpu") as engine:
        model = weakref.ref(engine.loaded.model)
        whole, left, stream, unread = (
            engine.ask(PHOTO, "what is this?", res=64, max_new_tokens=5, stream=True) for _ in range(4)
        )
        assert list(whole) and next(left)
        left.close()
        next(stream)
        raise ZeroDivisionError
    assert model() is None
    for cut in (stream, unread, stream, unread):
        with pytest.raises(UsageError, match="this engine is closed: load it again"):
            list(cut)
    assert list(whole) == list(left) == [], "which had ended before"
    with pytest.raises(UsageError, match="closed"):
        engine.generate("a cat")


def test_closing_ends_an_answer_that_another_thread_is_reading(
    tiny_release: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("UNIPIC_RUN_CACHE", str(tmp_path))
    engine, heard, begun, go_on = Engine.from_pretrained(tiny_release, device="cpu"), [], threading.Event(), []
    ids = Reader.answer

    def endless(self, request, cancel):
        token = next(ids(self, request, cancel))
        while True:
            begun.set()
            go_on.append(time.sleep(0.05))
            yield token

    monkeypatch.setattr(Reader, "answer", endless)
    stream = engine.ask(PHOTO, "what is this?", res=64, stream=True)

    def read() -> None:
        for _ in range(2):
            try:
                heard.append(list(stream))
            except UsageError as error:
                heard.append(str(error).partition(":")[0])

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    assert begun.wait(30) and in_thread(engine.close) == [None]
    reader.join(timeout=30)
    assert not reader.is_alive() and engine.loaded is None
    assert heard == ["this engine is closed"] * 2, "it is no whole answer, however often it is read"


def test_a_stream_that_is_just_being_ended_says_so() -> None:
    said = []

    def pieces() -> Iterator[str]:
        try:
            yield "a piece"
        finally:
            said.extend(in_thread(lambda: next(stream)))

    stream = Stream(pieces())
    assert next(stream) and stream.cut() and [type(error) for error in said] == [Closed]


def test_a_stream_that_a_thread_is_just_reading_is_cut_at_its_next_piece() -> None:
    begun, go, read = threading.Event(), threading.Event(), []

    def pieces() -> Iterator[str]:
        begun.set()
        go.wait(10)
        yield "a piece"

    stream = Stream(pieces())
    reader = threading.Thread(target=lambda: read.append(next(stream)))
    reader.start()
    assert begun.wait(10) and not stream.cut()
    go.set()
    reader.join(10)
    assert read == ["a piece"] and stream.cut()
    with pytest.raises(Closed):
        next(stream)


def test_a_stream_that_another_thread_reads_is_closed_behind_its_next_piece() -> None:
    begun, go, read = threading.Event(), threading.Event(), []

    def pieces() -> Iterator[str]:
        begun.set()
        go.wait(10)
        yield "a piece"
        yield "another"

    stream = Stream(pieces())
    reader = threading.Thread(target=lambda: read.extend(stream))
    closer = threading.Thread(target=lambda: (go.set(), stream.close()))
    reader.start()
    assert begun.wait(10)
    closer.start()
    reader.join(10)
    closer.join(10)
    assert read[:1] == ["a piece"] and list(stream) == [] and not reader.is_alive() and not closer.is_alive()


def test_closing_waits_for_no_stream_that_waits_for_another(
    tiny_release: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("UNIPIC_RUN_CACHE", str(tmp_path))
    engine, outcome = Engine.from_pretrained(tiny_release, device="cpu"), []
    first, second = (engine.ask(PHOTO, "what is this?", res=64, stream=True) for _ in range(2))
    next(first)

    def read() -> None:
        try:
            outcome.append(list(second))
        except UsageError as error:
            outcome.append(error)

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    while not second.pieces.gi_running:
        time.sleep(0.01)
    engine._streams = [second, first]  # in the worse order
    assert in_thread(engine.close) == [None]
    reader.join(timeout=30)
    assert not reader.is_alive() and isinstance(outcome[0], UsageError), "it had not begun"
    with pytest.raises(UsageError, match="this engine is closed"):
        next(second)


def test_a_close_in_the_middle_of_a_call_is_refused_and_changes_nothing(tiny_engine: Engine) -> None:
    refused, asked = [], {"res": 64, "max_new_tokens": 5, "stream": True}
    unread = tiny_engine.ask(PHOTO, "what is this?", **asked)

    def close(*given: object) -> None:
        with pytest.raises(UsageError, match="busy with a call of the same thread"):
            tiny_engine.close()
        refused.append(True)

    assert tiny_engine.generate("a cat", on_event=close, **QUICK).images and refused
    assert list(unread)
    answered = Reader.answer

    def answer(self, request, cancel):
        close()
        yield from answered(self, request, cancel)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Reader, "answer", answer)
        assert list(tiny_engine.ask(PHOTO, "what is this?", **asked))


def test_float32_scope_restores_the_callers_settings_after_the_last_engine() -> None:
    scope = torch.backends.cuda.matmul
    before, scope.fp32_precision = scope.fp32_precision, "tf32"
    try:
        first, second = true_float32(), true_float32()
        first.__enter__()
        second.__enter__()
        first.__exit__(None, None, None)
        assert scope.fp32_precision == "ieee" and torch.backends.mkldnn.matmul.fp32_precision == "ieee"
        second.__exit__(None, None, None)
        assert scope.fp32_precision == "tf32"
    finally:
        scope.fp32_precision = before


class Big:
    """Something a failed frame holds."""


@pytest.mark.parametrize(
    "failure",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
        RuntimeError("GET was unable to find an engine to execute this computation"),
        RuntimeError("Unable to find an engine"),
    ],
    ids=lambda failure: str(failure)[:20],
)
def test_running_out_of_memory_frees_what_the_failed_call_held(failure: Exception) -> None:
    held: list[weakref.ref] = []

    def work() -> None:
        big = Big()
        held.append(weakref.ref(big))
        raise failure

    with pytest.raises(BudgetError, match="out of memory while painting"), out_of_memory("painting"):
        work()
    assert held[0]() is None


def test_the_remedy_is_one_that_helps() -> None:
    for remedy in ({}, {"remedy": "wait"}):
        with pytest.raises(BudgetError) as caught, out_of_memory("painting", **remedy):
            raise torch.OutOfMemoryError
        assert caught.value.remedy == remedy.get("remedy", caught.value.remedy)
        assert remedy or ("--vram auto" in caught.value.remedy and "--quant int8" in caught.value.remedy)


def test_memory_of_the_machine_is_not_taken_for_the_gpus() -> None:
    def work() -> None:
        torch.empty(2**50, dtype=torch.uint8)

    def fail() -> None:
        raise MemoryError

    for how in (work, fail):
        with pytest.raises(HostMemoryError) as caught, out_of_memory("painting", "buy a larger GPU"):
            how()
        assert caught.value.what.startswith("out of the machine's own memory (RAM) while painting (")
        assert "end other programs" in caught.value.remedy and "GPU" not in str(caught.value)
        assert caught.value.exit_code == BudgetError.exit_code == 3


def test_other_errors_pass_through() -> None:
    with pytest.raises(RuntimeError, match="mine"), out_of_memory("painting"):
        raise RuntimeError("mine")
