"""`fp-client doctor`: is everything in place for this device to take part? Each failure says what to do."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from common.errors import ConfigError, FedPrunerError, StorageError, UnreachableError
from fp_client.commands import HERE, Directory, Json, at, bar, err, out
from fp_client.config import ClientConfig, cache_dir, human, load_config, need_server
from fp_client.policy import load_policy

LEAST_FREE = 1 << 30
"""Free disk below this is a failure: quantized units, adapter objects and updates go there."""


@dataclass(frozen=True)
class Finding:
    """One check: `note` says what was found, or what is wrong and what to do."""

    check: str
    ok: bool
    note: str
    code: int = 1


class Doctor:
    """The checks of one device directory."""

    def __init__(self, directory: Path, sequence: int, quiet: bool) -> None:
        self.directory, self.sequence, self.quiet = directory, sequence, quiet
        self.config = ClientConfig()

    def run(self) -> Iterator[Finding]:
        """All checks, in order; those that a failed one makes meaningless are left out."""
        yield (read := self._try("configuration", self._read_config))
        yield self._try("policy", self._policy)
        yield self._try("certificate", self._certificate)
        yield self._try("packages", self._packages)
        if read.ok:
            yield self._try("server", lambda: asyncio.run(self._server()))
            yield (budget := self._try("budget", self._budget))
            yield self._try("disk", self._disk)
            data = self._try("data", self._data)
            yield data
            for name in sorted(self.config.models):
                yield (model := self._try(f"model {name}", lambda name=name: self._model(name)))  # type: ignore[misc]
                if model.ok and data.ok and budget.ok:
                    yield self._try(f"memory {name}", lambda name=name: self._memory(name))  # type: ignore[misc]
                if model.ok and data.ok:
                    yield self._try(f"window {name}", lambda name=name: asyncio.run(self._window(name)))  # type: ignore[misc]
            if not self.config.models:
                yield Finding("model", False, 'none is configured; add [models."NAME"] with source = "DIR" to client.toml', 2)

    def _try(self, check: str, work: Callable[[], str]) -> Finding:
        try:
            return Finding(check, True, work())
        except FedPrunerError as error:
            return Finding(check, False, str(error), error.exit_code)

    def _read_config(self) -> str:
        self.config = load_config(self.directory)
        threads = "1 thread" if self.config.threads == 1 else f"{self.config.threads} threads"
        return f"{self.directory / 'client.toml'} is read; device {self.config.device}, {threads}"

    def _policy(self) -> str:
        policy = load_policy(self.directory)
        return (
            f"at most {policy.max_steps} steps, {policy.max_sequence_length} tokens a row, rank {policy.max_rank}, "
            f"{human(policy.max_upload)} sent a round, {policy.max_tasks_a_day} tasks a day"
        )

    def _certificate(self) -> str:
        from common.transport import tls
        from fp_client.renewal import describe

        tls.client_credentials(self.directory)
        return describe(self.directory / "device.pem", f"fp-client renew{at(self.directory)}")

    def _packages(self) -> str:
        found, missing = [], []
        for name in ("torch", "transformers", "peft", "bitsandbytes"):
            try:
                found.append(f"{name} {metadata.version(name)}")
            except metadata.PackageNotFoundError:
                missing.append(name)
        if missing:
            raise FedPrunerError(
                f"missing: {', '.join(missing)}; install with `pip install -c constraints.txt '.[client]' in a checkout`"
            )
        return ", ".join(found)

    async def _server(self) -> str:
        """The standard health service, which asks for no identity, and a question that does.

        Neither disturbs a daemon's session.
        """
        import grpc
        from grpc_health.v1 import health_pb2, health_pb2_grpc

        from common.transport.replies import serving
        from fp_client.rpc import Connection
        from fp_client.rpc_objects import Transfer

        address = need_server(self.config, self.directory)
        connection = Connection(self.directory, address)
        try:
            for _ in range(2):  # a refused certificate is believed the second time
                try:
                    said = ""
                    try:
                        stub = health_pb2_grpc.HealthStub(connection.channel)
                        said = f" ({serving(await stub.Check(health_pb2.HealthCheckRequest(), timeout=10), address)})"
                    except grpc.aio.AioRpcError as error:
                        if error.code() != grpc.StatusCode.UNIMPLEMENTED:
                            raise await connection.translate(error) from None
                    await Transfer(connection).admitted()
                    return f"{address} accepts this certificate{said}"
                except UnreachableError as error:
                    away = error
            raise away
        finally:
            await connection.close()

    def _budget(self) -> str:
        from fp_client.work import budget_of, resolve_device

        device = resolve_device(self.config.device)
        budget = budget_of(self.config, device)
        if not budget:
            key = "device" if device == "cuda" else "host"
            raise ConfigError(f'no budget is set: a task could take all memory; set [budget] {key} = "…" in client.toml')
        return f"{human(budget)} of {'VRAM' if device == 'cuda' else 'main memory'}; see `fp-client plan{at(self.directory)}`"

    def _disk(self) -> str:
        cache = cache_dir(self.config, self.directory)
        there = next(path for path in (cache, *cache.parents) if path.exists())
        free = shutil.disk_usage(there).free
        if free < LEAST_FREE:
            raise StorageError(f"{there}: {human(free)} free; free some space, or set [cache] dir to another disk")
        return f"{human(free)} free at {there}"

    def _data(self) -> str:
        from fp_client.data import count_examples
        from fp_client.work import data_source

        source = data_source(self.config, self.directory)
        train, held = count_examples(source)
        return f"{source.source}: {train} examples to train on, {held} held out"

    def _model(self, name: str) -> str:
        from common.checkpoint import cached_fingerprint
        from fp_client.work import LocalWork

        work = LocalWork(self.config, self.directory)
        section, checkpoint = work.open_model(name)
        try:
            modules = checkpoint.modules()
            with bar(f"reading the weights of {name}", self.quiet) as progress:
                fingerprint = cached_fingerprint(checkpoint, work.cache, progress)
        finally:
            checkpoint.close()
        shape = f"{checkpoint.family}, {checkpoint.layers} layers of {len(modules)} modules"
        return f"{shape}, quantization {section.quantization}, fingerprint {fingerprint[:16]}…"

    def _memory(self, name: str) -> str:
        """Does the budget hold a submodel? For the rank and batch that `fp-client plan` takes."""
        from common.types import Gradient, ProbeSpec, RunSpec, TrainSpec
        from fp_client.shapes import shape_of
        from fp_client.work import LocalWork

        work = LocalWork(self.config, self.directory)
        _, checkpoint = work.open_model(name)
        checkpoint.close()
        shape = shape_of(checkpoint.config)
        targets = tuple(sorted(module.name for module in shape.modules))
        train = TrainSpec(10, 4, self.sequence, 1e-4, 16, 32.0, targets, 0, gradient=Gradient.AUTO)
        probe = ProbeSpec(batch_size=4, sequence_length=self.sequence)
        planned = work.planned(RunSpec("local", name, "", "", probe.part, train, probe, 64, 1))
        held = ", ".join(f"{mode.units} of {shape.layers} layers {mode.gradient}" for mode in planned.modes)
        return f"the budget holds {held} (4 rows of {self.sequence} tokens, rank 16)"

    async def _window(self, name: str) -> str:
        """Starts a real worker: torch and the rest import, and every response is measured with the tokenizer."""
        from common.types import ProbeSpec
        from fp_client.commands_probe import local_spec
        from fp_client.messages import CheckArgs, CheckResult
        from fp_client.work import LocalWork

        work = LocalWork(self.config, self.directory)
        try:
            worker = await work.worker(local_spec(name, ProbeSpec()))
            ready = await worker.start()
            check = await worker.run("check", CheckArgs(self.sequence), CheckResult)
        finally:
            await work.close()
        dropped = f", {check.dropped} too long and left out" if check.dropped else ", none too long"
        return f"{check.samples} examples fit {self.sequence} tokens{dropped}; the worker holds {human(ready.warmed_bytes)} idle"


def doctor(
    directory: Directory = HERE,
    sequence: Annotated[int, typer.Option(min=2, help="The window responses must fit, in tokens.")] = 512,
    as_json: Json = False,
) -> None:
    """Check certificate, server, model, data, budget, packages and disk. Exits with the first failure's code."""
    findings: list[Finding] = []
    checks = Doctor(directory, sequence, as_json).run()
    if as_json:
        findings = list(checks)
        typer.echo(json.dumps([_plain(finding) for finding in findings], indent=1))
    else:
        table = Table(show_header=False)
        with err.status("checking"):
            for finding in checks:
                findings.append(finding)
                mark = Text("✓", "green") if finding.ok else Text("✗", "red")
                table.add_row(mark, finding.check, finding.note)
        out.print(table)
    if failed := [finding for finding in findings if not finding.ok]:
        raise typer.Exit(failed[0].code)


def _plain(finding: Finding) -> dict[str, Any]:
    return {"check": finding.check, "ok": finding.ok, "note": finding.note}


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(epilog="Example:  fp-client doctor --dir dev1 --sequence 256")(doctor)
