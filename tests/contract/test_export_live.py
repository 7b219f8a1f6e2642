"""`fp-server export` beside a server that works: it removes a ledger's files as soon as a round has replaced them."""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path

import pytest
from server_side import Device, Server, run_toml, whole_run

from common.errors import DamagedError, NotFound
from common.types import ObjectRef
from fp_server import exporting
from fp_server.exporting import export_run

TOML = run_toml("global", final_evaluation=False)


@pytest.fixture
def stopped(server) -> Server:
    """A server with a finished run, stopped."""
    asyncio.run(whole_run(server, [Device(server, "alice"), Device(server, "bob")], TOML))
    assert server.stop() == 0
    return server


def written(adapter: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in adapter.iterdir()}


def objects(server: Server) -> list[Path]:
    return sorted((server.directory / "objects").glob("??/*"))


def test_a_ledger_that_is_replaced_during_the_export_is_exported_whole(stopped, tmp_path, monkeypatch):
    export_run(stopped.directory, "", tmp_path / "calm", "", None)
    real = exporting.export_peft

    def moved_on(*args, **named):
        for path in objects(stopped):
            path.unlink()
        return real(*args, **named)

    monkeypatch.setattr(exporting, "export_peft", moved_on)
    export_run(stopped.directory, "", tmp_path / "adapter", "", None)
    assert not objects(stopped) and written(tmp_path / "adapter") == written(tmp_path / "calm")


def test_where_a_file_was_gone_already_the_log_is_read_again(stopped, tmp_path, monkeypatch):
    tries, real = [], exporting.open_run

    @contextlib.contextmanager
    def once_late(directory, run):
        with real(directory, run) as (machine, store):
            tries.append(run)
            if len(tries) == 1:  # as it was a round ago
                machine.ledger[max(machine.ledger)] = ObjectRef("0" * 64, 1)
            yield machine, store

    monkeypatch.setattr(exporting, "open_run", once_late)
    assert "after 2 rounds" in export_run(stopped.directory, "", tmp_path / "adapter", "", None) and len(tries) == 2


def test_what_is_really_missing_is_damage_after_so_many_looks(stopped, tmp_path, monkeypatch):
    tries, real = [], exporting.open_run

    def counted(directory, run):
        tries.append(run)
        return real(directory, run)

    monkeypatch.setattr(exporting, "open_run", counted)
    with real(stopped.directory, "") as (machine, store):
        store.path(machine.ledger[max(machine.ledger)].digest).unlink()
    with pytest.raises(DamagedError, match=r"the ledger of layer \d+ of run 'toy-run': .* is missing; .*of a backup"):
        export_run(stopped.directory, "", tmp_path / "adapter", "", None)
    assert len(tries) == exporting.TRIES and not (tmp_path / "adapter").exists()


def test_exports_beside_a_running_server_all_end_well(server, tmp_path):
    outs: list[Path] = []

    async def main():
        devices = [Device(server, "alice"), Device(server, "bob")]
        running = asyncio.create_task(whole_run(server, devices, run_toml("global", rounds=15, final_evaluation=False), 120))
        while not running.done():
            out = tmp_path / f"a{len(outs)}"
            with contextlib.suppress(NotFound):  # before the first round is over
                await asyncio.to_thread(export_run, server.directory, "", out, "", None)
                outs.append(out)
            await asyncio.sleep(0)
        return await running

    assert asyncio.run(main())["state"] == "finished"
    assert len({(out / "adapter_model.safetensors").read_bytes() for out in outs}) > 2, "they are of different moments"
