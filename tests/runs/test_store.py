"""The run store: order under many writers, states that follow from events and locks, bad input."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given
from hypothesis import strategies as st

from lbllm.config import RunConfig, make_config
from lbllm.errors import ResourceError, RunError
from lbllm.events import (
    EVENT,
    Acknowledged,
    BlockDone,
    Evaluated,
    Event,
    RunDone,
    RunFailed,
    RunLoading,
    RunQueued,
    RunStarted,
    RunStopped,
    StepMetric,
)
from lbllm.runs.store import Request, RunStore, State
from tests.helpers import ROOT, waiting
from tests.helpers.cases import cases

STARTED = RunStarted(
    stages=("ptq",), blocks=2, layers=14, weights=1000, device="cpu", corpus_hash="0", tokens=512, bpw=3.0
)
DONE = RunDone(path="checkpoint", bpw=3.0, disk_bytes=1, seconds=1.0)
EVALUATED = Evaluated(what="teacher", text="wikitext2", perplexity=20.0, tokens=100)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[RunStore]:
    store = RunStore(tmp_path / "store")
    yield store
    store.close()


def step(number: int) -> StepMetric:
    return StepMetric(stage="wat", block=0, step=number, loss=0.5, lr=1e-3, tokens_per_second=100.0)


def python(code: str, *arguments: object) -> subprocess.Popen[str]:
    """Another Python process that runs ``code``; it has to be waited for."""
    # As in our own commands, importing the package doesn't bring torch with it, which takes seconds.
    code = "import sys; sys.argv[0] = '-m'\n" + textwrap.dedent(code)
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)


wait_until = partial(waiting.wait_until, seconds=60.0)


APPENDER = """
    import sys
    from pathlib import Path
    from lbllm.events import StepMetric
    from lbllm.runs.store import RunStore
    root, run_id, block, count = sys.argv[1:]
    store = RunStore(Path(root))
    for step in range(int(count)):
        store.append(run_id, StepMetric(
            stage="wat", block=int(block), step=step, loss=1.0, lr=1.0, tokens_per_second=1.0))
"""

# A stand-in for a worker that needs no model: it takes the run's lock as a worker does, and waits to be killed.
HOLDER = """
    import sys, time
    from pathlib import Path
    from lbllm.events import EVENT
    from lbllm.runs.store import RESUMABLE, RunStore
    root, run_id, *events = sys.argv[1:]
    store = RunStore(Path(root))
    lock = store.enqueue(run_id, "run", ("queued", *RESUMABLE))
    for event in events:
        store.append(run_id, EVENT.validate_json(event))
    print("ready", flush=True)
    time.sleep(60)
"""


def holder(store: RunStore, run_id: str, *events: Event) -> subprocess.Popen[str]:
    process = python(HOLDER, store.root, run_id, *(EVENT.dump_json(event).decode() for event in events))
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def kill(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.communicate()


def test_a_new_run_keeps_its_settings_and_is_queued(store: RunStore) -> None:
    config = make_config("preview", {"model": "some/model", "quant": {"group_size": 128}})
    run = store.create(config)
    assert run.state == "queued"
    assert run.config == config
    assert run.name == "model w1+1 g128"
    assert abs(run.created - time.time()) < 10
    assert store.create(config, name="mine").name == "mine"
    other = RunStore(store.root)
    assert [found.id for found in other.all()] == [found.id for found in store.all()]
    assert other.get(run.id) == run


def test_appended_events_come_back_numbered_and_in_order(store: RunStore) -> None:
    runs = [store.create(RunConfig()).id for _ in range(2)]
    for number in range(5):
        assert store.append(runs[0], step(number)).seq == number + 1
    assert store.append(runs[1], DONE).seq == 1
    assert [stored.seq for stored in store.events(runs[0], after_seq=2)] == [3, 4, 5]
    assert [stored.event for stored in store.events(runs[0])] == [step(number) for number in range(5)]
    assert store.events(runs[0], after_seq=5) == []
    times = [stored.time for stored in store.events(runs[0])]
    assert times == sorted(times)


numbers = st.floats(allow_nan=False, allow_infinity=False)
events = st.one_of(
    st.builds(step, st.integers(0, 10**6)),
    st.builds(RunFailed, message=st.text()),
    st.builds(Acknowledged, request=st.sampled_from(["stop", "cancel"])),
    st.builds(
        BlockDone,
        stage=st.sampled_from(["ptq", "wat", "aar"]),
        block=st.integers(0, 99),
        loss_before=numbers,
        loss_after=numbers,
        seconds=numbers,
        memory_bytes=st.integers(0, 2**50),
    ),
)


@cases(30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(written=st.lists(events, max_size=12), cursor=st.integers(0, 14))
def test_a_cursor_reads_exactly_what_follows_it(store: RunStore, written: list[Event], cursor: int) -> None:
    run_id = store.create(RunConfig()).id
    stored = [store.append(run_id, event) for event in written]
    assert [item.event for item in stored] == written
    assert store.events(run_id, cursor) == stored[cursor:]


def test_many_processes_append_without_a_gap_while_readers_follow(store: RunStore) -> None:
    run_id = store.create(RunConfig()).id
    lock = store.enqueue(run_id, "run", ("queued",))
    store.append(run_id, STARTED)
    seen: list[list[int]] = [[], []]

    def read(into: list[int]) -> None:
        own = RunStore(store.root)
        into.extend(stored.seq for stored in own.follow(run_id, poll=0.005))
        own.close()

    readers = [threading.Thread(target=read, args=(into,)) for into in seen]
    for reader in readers:
        reader.start()
    writers = [python(APPENDER, store.root, run_id, block, 150) for block in range(4)]
    assert [writer.wait() for writer in writers] == [0] * 4
    store.append(run_id, DONE)
    lock.close()
    for reader in readers:
        reader.join(20)
    total = 4 * 150 + 3
    assert seen == [list(range(1, total + 1))] * 2
    for block in range(4):
        own = [stored.event for stored in store.events(run_id)]
        steps = [event.step for event in own if isinstance(event, StepMetric) and event.block == block]
        assert steps == list(range(150))


def more_events(store: RunStore, run_id: str, before: int) -> bool:
    return len(store.events(run_id)) > before


def test_a_writer_killed_at_any_moment_leaves_whole_events(store: RunStore) -> None:
    run_id = store.create(RunConfig()).id
    for wait in (0.0, 0.013, 0.1):
        before = len(store.events(run_id))
        writer = python(APPENDER, store.root, run_id, 0, 10**9)
        wait_until(partial(more_events, store, run_id, before))
        time.sleep(wait)
        kill(writer)
    found = store.events(run_id)
    assert [stored.seq for stored in found] == list(range(1, len(found) + 1))
    with sqlite3.connect(store.root / "runs.db") as db:
        assert db.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
    assert store.append(run_id, DONE).seq == len(found) + 1


@pytest.mark.parametrize(
    ("written", "state"),
    [
        ([], "queued"),
        ([RunQueued(), RunLoading(), STARTED, DONE], "done"),
        ([RunQueued(), RunLoading(), STARTED, DONE, EVALUATED], "done"),
        ([RunQueued(), Acknowledged(request="stop"), RunStopped(request="stop")], "stopped"),
        ([RunQueued(), STARTED, RunStopped(request="cancel")], "cancelled"),
        ([RunQueued(), RunFailed(message="no")], "failed"),
        ([RunQueued()], "interrupted"),
        ([RunQueued(), RunLoading()], "interrupted"),
        ([RunQueued(), STARTED, step(1)], "interrupted"),
        ([RunQueued(), STARTED, RunStopped(request="stop"), RunQueued(), STARTED], "interrupted"),
        ([RunQueued(), STARTED, RunStopped(request="stop"), RunQueued(), STARTED, DONE], "done"),
    ],
)
def test_the_state_of_a_run_without_a_worker_follows_from_its_events(
    store: RunStore, written: list[Event], state: State
) -> None:
    run_id = store.create(RunConfig()).id
    for event in written:
        store.append(run_id, event)
    assert store.get(run_id).state == state
    assert [run.state for run in store.all()] == [state]


def test_a_run_is_queued_then_running_and_interrupted_once_its_worker_is_killed(store: RunStore) -> None:
    run_id = store.create(RunConfig()).id
    waiting = holder(store, run_id)
    assert store.get(run_id).state == "queued"
    kill(waiting)
    assert store.get(run_id).state == "interrupted"
    for last in (RunLoading(), STARTED, step(3)):
        working = holder(store, run_id, *([] if isinstance(last, RunLoading) else [STARTED]), last)
        assert store.get(run_id).state == "running"
        kill(working)
        assert store.get(run_id).state == "interrupted"
    seqs = [stored.seq for stored in store.events(run_id)]
    assert seqs == list(range(1, len(seqs) + 1))


def test_one_worker_a_run(store: RunStore) -> None:
    run_id = store.create(RunConfig()).id
    working = holder(store, run_id, STARTED)
    with pytest.raises(RunError, match=f"{run_id} is running and can't be started"):
        store.start(run_id)
    with pytest.raises(RunError, match="is running and can't be resumed"):
        store.resume(run_id)
    kill(working)
    with pytest.raises(RunError, match="is interrupted and can't be started"):
        store.start(run_id)


@pytest.mark.parametrize("end", [[STARTED, DONE], [STARTED, RunStopped(request="cancel")]])
def test_only_an_unfinished_run_can_be_resumed(store: RunStore, end: list[Event]) -> None:
    run_id = store.create(RunConfig()).id
    for event in end:
        store.append(run_id, event)
    state = store.get(run_id).state
    with pytest.raises(RunError, match=rf"{run_id} is {state} and can't be resumed; only stopped, failed, interrupted"):
        store.resume(run_id)
    assert len(store.events(run_id)) == len(end)


@pytest.mark.parametrize(
    ("end", "request_", "state"),
    [
        ([], "stop", "stopped"),
        ([], "cancel", "cancelled"),
        ([STARTED, RunStopped(request="stop")], "cancel", "cancelled"),
        ([STARTED, RunFailed(message="no")], "cancel", "cancelled"),
        ([STARTED], "cancel", "cancelled"),
    ],
)
def test_a_request_to_a_run_without_a_worker_takes_effect_at_once(
    store: RunStore, end: list[Event], request_: Request, state: State
) -> None:
    run = store.create(RunConfig())
    (run.folder / "blocks").mkdir()
    (run.folder / "blocks" / "0.safetensors").write_bytes(b"work")
    for event in end:
        store.append(run.id, event)
    store.request(run.id, request_)
    assert store.get(run.id).state == state
    assert (run.folder / "blocks").exists() == (request_ == "stop")
    assert [stored.event for stored in store.events(run.id)] == [
        *end,
        Acknowledged(request=request_),
        RunStopped(request=request_),
    ]


@pytest.mark.parametrize(
    ("last", "request_", "message"),
    [
        (DONE, "cancel", "is done and can't be cancelled"),
        (DONE, "stop", "is done and can't be stopped"),
        (RunStopped(request="cancel"), "cancel", "is cancelled and can't be cancelled"),
        (RunFailed(message="no"), "stop", "is failed and can't be stopped"),
    ],
)
def test_a_request_that_comes_too_late_is_refused(
    store: RunStore, last: Event, request_: Request, message: str
) -> None:
    run_id = store.create(RunConfig()).id
    store.append(run_id, last)
    with pytest.raises(RunError, match=message):
        store.request(run_id, request_)
    assert len(store.events(run_id)) == 1


def test_a_state_is_right_at_every_moment_of_quick_starts_and_ends(store: RunStore) -> None:
    """Whoever reads the state never sees a run that is handed from one worker to the next as interrupted."""
    run_id = store.create(RunConfig()).id
    states: set[State] = set()
    over = threading.Event()

    def watch() -> None:
        own = RunStore(store.root)
        while not over.is_set():
            states.add(own.get(run_id).state)
        own.close()

    watcher = threading.Thread(target=watch)
    watcher.start()
    for _ in range(100):
        with store.enqueue(run_id, "run", ("queued", "stopped")):
            store.append(run_id, RunLoading())
            store.append(run_id, RunStopped(request="stop"))
    over.set()
    watcher.join()
    assert states <= {"queued", "running", "stopped"}


def test_an_unknown_run_is_named(store: RunStore) -> None:
    for action in (store.get, store.events, store.start, store.resume, lambda run_id: store.append(run_id, DONE)):
        with pytest.raises(RunError, match=r"no run '\.\./elsewhere'"):
            action("../elsewhere")
    with pytest.raises(RunError, match="no run"):
        store.request("nothing", "stop")


def test_damaged_settings_concern_their_run_alone(store: RunStore) -> None:
    bad, good = store.create(RunConfig()), store.create(RunConfig())
    (bad.folder / "config.json").write_text('{"model": ')
    assert [run.id for run in store.all()] == [bad.id, good.id]
    with pytest.raises(RunError, match="settings can't be read"):
        _ = store.get(bad.id).config
    assert store.get(good.id).config == RunConfig()


def test_a_foreign_or_newer_database_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "runs.db").write_bytes(b"no database, but long enough to be taken for one" * 100)
    with pytest.raises(RunError, match="is no run store"):
        RunStore(tmp_path / "a")
    RunStore(tmp_path / "b").close()
    with sqlite3.connect(tmp_path / "b" / "runs.db") as db:
        db.execute("PRAGMA user_version = 99")
    with pytest.raises(RunError, match="version 99"):
        RunStore(tmp_path / "b")


def test_a_root_that_cannot_be_a_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ResourceError, match="file/runs can't be written"):
        RunStore(tmp_path / "file" / "runs")


FILLER = """
    import resource, sys
    from pathlib import Path
    from lbllm.config import RunConfig
    from lbllm.errors import ResourceError
    from lbllm.events import RunFailed
    from lbllm.runs.store import RunStore
    store = RunStore(Path(sys.argv[1]))
    run_id = store.create(RunConfig()).id
    resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))
    for count in range(10_000):
        try:
            store.append(run_id, RunFailed(message="x" * 1000))
        except ResourceError as error:
            print(run_id, count, error)
            break
"""


def test_a_write_that_finds_no_room_changes_nothing(store: RunStore) -> None:
    process = python(FILLER, store.root)
    output, _ = process.communicate()
    assert process.returncode == 0
    run_id, count, message = output.split(maxsplit=2)
    assert "can't be written" in message
    assert "free some space" in message
    assert int(count) > 0
    assert [stored.seq for stored in store.events(run_id)] == list(range(1, int(count) + 1))
    assert store.append(run_id, DONE).seq == int(count) + 1


def test_an_append_is_cheap(store: RunStore) -> None:
    run_id = store.create(RunConfig()).id
    begin = time.process_time()
    for number in range(500):
        store.append(run_id, step(number))
    assert (time.process_time() - begin) / 500 < 2e-3
