"""Objects that are not what was written: found by their digest, put aside, and never trusted again."""

from __future__ import annotations

import errno
import hashlib

import pytest
from test_rounds import MANIFEST, Shell, accepted, digest

from common.errors import AlreadyDone, DamagedError, StorageError
from fp_server import commands as c
from fp_server import events as e
from fp_server import objects
from fp_server.objects import ObjectStore
from fp_server.rounds import RunMachine
from fp_server.roundstate import Phase, Stage

DATA = b"the bytes of an object"
DIGEST = hashlib.sha256(DATA).hexdigest()


@pytest.fixture
def store(tmp_path):
    one = ObjectStore(tmp_path)
    put(one)
    return one


def put(store, data: bytes = DATA):
    (store.scratch / "x").write_bytes(data)
    return store.adopt(store.scratch / "x", DIGEST)


def spoil(store) -> None:
    path = store.path(DIGEST)
    path.chmod(0o644)
    path.write_bytes(DATA[:-1] + b"?")


@pytest.mark.parametrize("at", range(len(DATA)))
def test_any_flipped_bit_is_found_and_the_object_put_aside(store, at):
    said = []
    store.quarantined = lambda digest, why: said.append((digest, why))
    assert store.checked(DIGEST).read_bytes() == DATA
    data = bytearray(DATA)
    data[at] ^= 1 << (at % 8)
    path = store.path(DIGEST)
    path.chmod(0o644)
    path.write_bytes(data)
    with pytest.raises(DamagedError, match=r"are not what was written$"):
        store.sound(DIGEST)
    assert store.has(DIGEST), "reading moves nothing"
    with pytest.raises(DamagedError, match=rf"are not what was written; moved to quarantine/{DIGEST}$"):
        store.checked(DIGEST)
    assert not store.has(DIGEST) and (store.quarantine / DIGEST).read_bytes() == data and len(said) == 1
    with pytest.raises(DamagedError, match="is missing"):
        store.checked(DIGEST)
    assert len(said) == 1


def test_a_second_damaged_copy_does_not_hide_the_first(store):
    for _ in range(3):
        put(store)
        spoil(store)
        with pytest.raises(DamagedError):
            store.checked(DIGEST)
    assert sorted(path.name for path in store.quarantine.iterdir()) == [DIGEST, f"{DIGEST}.1", f"{DIGEST}.2"]


def test_the_same_object_adopted_again_takes_the_place_of_a_damaged_one(store):
    spoil(store)
    put(store)
    assert store.sound(DIGEST).read_bytes() == DATA and len(list(store.quarantine.iterdir())) == 1
    put(store)
    assert len(list(store.quarantine.iterdir())) == 1, "a whole one stays"


def test_what_the_disk_can_not_read_is_damaged_and_other_errors_are_not(store, monkeypatch):
    def failing(code):
        def read(path):
            raise OSError(code, "no")

        return read

    monkeypatch.setattr(objects, "digest_file", failing(errno.EACCES))
    with pytest.raises(StorageError) as refused:
        store.checked(DIGEST)
    assert not isinstance(refused.value, DamagedError) and store.has(DIGEST)
    monkeypatch.setattr(objects, "digest_file", failing(errno.EIO))
    with pytest.raises(DamagedError, match="can't be read"):
        store.checked(DIGEST)
    assert not store.has(DIGEST)


def test_a_full_disk_leaves_the_damaged_object_where_it_is(store, monkeypatch):
    spoil(store)

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("pathlib.Path.mkdir", full)
        with pytest.raises(StorageError, match="no space left"):
            store.checked(DIGEST)
    assert store.has(DIGEST)
    with pytest.raises(DamagedError, match="moved to"):
        store.checked(DIGEST)


def lost(shell, *devices: str) -> e.UpdatesLost:
    return e.UpdatesLost("r", shell.key, dict.fromkeys(devices, "its bytes are not what was written"))


def refold(shell: Shell) -> RunMachine:
    machine = RunMachine(shell.machine.config, MANIFEST)
    for at, event in shell.log:
        machine.handle(event, at)
    return machine


def closed_round(**run) -> Shell:
    shell = Shell(**run)
    shell.join("a", "b")
    shell.probe("a", "b")
    shell.assign("a", "b")
    shell.accept("a", "b")
    assert shell.machine.phase is Phase.AGGREGATING
    return shell


def test_a_closed_round_opens_again_for_who_must_push_again_and_ends_as_before():
    shell = closed_round()
    key = shell.key
    out = shell.do(lost(shell, "b"))
    assert [type(command) for command in out] == [c.SendAssignment] and out[0].device == "b"
    assert shell.machine.phase is Phase.ROUND and shell.stage("a") is Stage.DONE and shell.stage("b") is Stage.TRAINING
    assert shell.machine.references() == {digest("a", 0).digest}
    assert not shell.machine.check_push("b", key, digest("b", 0)), "the same update is welcome"
    with pytest.raises(AlreadyDone):
        shell.machine.check_push("a", key, digest("a", 1))
    assert repr(refold(shell).current) == repr(shell.machine.current), "the log folds to the same"
    out = shell.do(accepted(key, "b"))
    assert c.Review(key) in out and shell.machine.phase is Phase.AGGREGATING
    shell.commit()
    assert shell.machine.next_round == 1


def test_lost_twice_is_lost_once():
    shell = closed_round()
    event = lost(shell, "b")
    shell.do(event)
    assert shell.do(event) == []
    shell.do(accepted(shell.key, "b"))
    assert shell.machine.phase is Phase.AGGREGATING


def test_one_that_does_not_push_again_is_out_by_the_usual_time_out():
    shell = closed_round(progress_timeout_seconds=60.0)
    shell.now = 1000.0
    shell.do(lost(shell, "b"))
    shell.now = 1050.0
    shell.do(c.Tick())
    assert shell.stage("b") is Stage.TRAINING
    shell.now = 1061.0
    key = shell.key
    out = shell.do(c.Tick())
    assert c.Review(key) in out and shell.stage("b") is Stage.DROPPED


def test_with_all_of_them_lost_the_round_is_drawn_again_by_the_usual_rules():
    shell = closed_round(progress_timeout_seconds=60.0, min_updates=2)
    shell.do(lost(shell, "a", "b"))
    shell.now += 61
    shell.do(c.Tick())
    assert shell.machine.failures == 1 and shell.machine.ledger == {}


def test_who_was_told_that_the_round_is_over_is_not_waited_for_when_it_opens_again():
    shell = Shell(quorum=0.5, progress_timeout_seconds=1e6)
    shell.join("a", "b")
    shell.probe("a", "b")
    shell.assign("a", "b")
    shell.accept("a")
    assert shell.machine.phase is Phase.AGGREGATING
    shell.do(lost(shell, "a"))
    assert shell.stage("b") is Stage.DROPPED and shell.stage("a") is Stage.TRAINING
    assert repr(refold(shell).current) == repr(shell.machine.current)
    shell.accept("a")
    assert shell.machine.phase is Phase.AGGREGATING


def test_an_update_lost_in_a_round_that_is_over_changes_nothing():
    shell = closed_round()
    event = lost(shell, "b")
    shell.commit()
    state = shell.machine.phase
    assert shell.do(event) == [] and shell.machine.phase is state
