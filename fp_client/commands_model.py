"""`fp-client merge` and `fp-client manifest`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from common.errors import StorageError
from fp_client.commands import Json, bar, out


def merge(
    model_dir: Annotated[Path, typer.Argument(help="The base model's directory.")],
    adapter_dir: Annotated[Path, typer.Argument(help="A PEFT adapter directory, as `fp-server export` writes it.")],
    out_dir: Annotated[Path, typer.Argument(help="Where the merged model goes; must not exist.")],
    as_json: Json = False,
) -> None:
    """Write the base model with the adapter merged in, one tensor at a time."""
    from fp_client.merge import merge as work

    with bar("merging", as_json) as progress:
        changed = work(model_dir, adapter_dir, out_dir, lambda _, done, total: progress(done, total))
    if as_json:
        typer.echo(json.dumps({"out": str(out_dir), "changed": changed}))
    else:
        out.print(f"merged {changed} weights into {out_dir}")


def manifest(
    model_dir: Annotated[Path, typer.Argument(help="The model's directory.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The manifest to write (JSON); - prints it.")],
    name: Annotated[str, typer.Option(help="The model's name in run files; the directory's if left out.")] = "",
    as_json: Json = False,
) -> None:
    """Write the shapes and the fingerprint of a model, for a server that does not hold its weights."""
    from common.checkpoint import Checkpoint, dump_manifest

    checkpoint = Checkpoint(model_dir)
    try:
        checkpoint.modules()  # a missing layer is said before minutes of hashing
        with bar("reading the weights", as_json) as progress:
            fingerprint = checkpoint.fingerprint(progress)
        text = dump_manifest(checkpoint.manifest(name or model_dir.resolve().name, fingerprint))
    finally:
        checkpoint.close()
    if output == Path("-"):
        typer.echo(text)
        return
    temporary = output.with_name(output.name + ".tmp")
    try:
        temporary.write_text(text)
        temporary.replace(output)
    except OSError as error:
        raise StorageError(f"{output}: can't be written: {error.strerror}") from None
    typer.echo(
        json.dumps({"out": str(output), "fingerprint": fingerprint}) if as_json else f"{output}: fingerprint {fingerprint}"
    )


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.command(epilog="Example:  fp-client merge models/SmolLM2 adapter merged")(merge)
    app.command(epilog="Example:  fp-client manifest models/SmolLM2 -o smollm2.json --name smollm2-135m")(manifest)
