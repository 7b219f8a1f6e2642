"""The planner against the kernel: predicted and measured peaks of training and probing, each in a fresh process.

    python benchmarks/planner.py [--dir .cache/random] [--results FILE] [--only TEXT] [--redo] [--seven]

For each setting (model shape × budget × batch × quantization) the planner chooses from the config alone, the choice is
run on random weights of that shape, and the peak above the warmed footprint is compared. The contract: never less than
measured, and more by at most max(15 %, 48 MiB) and the room that bf16 keeps for kernels of rows of other lengths; not in
ragged probes, whose rows are shorter than the windows planned for. Exit code 1 when it is broken. Results are kept as
they come; a setting that is there already is not run again. `--seven` adds the LLaMA2-7B shape (about 6 GB of disk) and
prints the 13B row.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from planner_cases import CASES, NF4, SEVEN, Case
from random_weights import generate

from common.codec import from_json, to_json
from common.types import Gradient
from fp_client.memory import MIB, OVERHEAD_KERNELS, Estimate
from fp_client.pool import worker_environment
from fp_client.shapes import CONFIGS, shape_of

ROOT = Path(__file__).resolve().parent.parent

REAL_LAYERS = {"tinyllama-1.1b": 16, "llama2-7b": 14}
"""Layers that get real bytes; the other shards are holes."""


def measure_case(case: Case, directory: Path, kind: str) -> dict[str, Any]:
    """Run the plan in this process, which must be fresh; `kind` is ``train`` or ``probe``."""
    import numpy as np
    import torch

    from common.checkpoint import Checkpoint
    from common.types import LoraBlock
    from fp_client import measure
    from fp_client.loader import UnitLoader
    from fp_client.probe import probe
    from fp_client.tasks import collecting
    from fp_client.template import IGNORE
    from fp_client.train import train
    from fp_client.trainers import open_trainer
    from fp_client.warmup import warm_up

    torch.set_num_threads(case.threads)
    dtype = getattr(torch, case.dtype)
    warm_up("cpu", dtype, case.quantization)
    planned, shape = case.plan(), shape_of(CONFIGS[case.shape])
    checkpoint = Checkpoint(directory / case.shape)
    by_name = {module.name: module for module in shape.modules}

    def blocks(layer: int) -> list[LoraBlock]:
        generator, r = np.random.default_rng(layer), case.broadcast_rank
        return [
            LoraBlock(
                layer, name,
                generator.standard_normal((r, by_name[name].d_in), np.float32) * np.float32(0.01),
                generator.standard_normal((by_name[name].d_out, r), np.float32) * np.float32(0.01),
            )
            for name in case.targets if r
        ]  # fmt: skip

    class Adapter(Mapping[int, list[LoraBlock]]):
        """Made when asked for, as a worker reads them from files."""

        def __getitem__(self, layer: int) -> list[LoraBlock]:
            return blocks(layer)

        def __iter__(self) -> Iterator[int]:
            return iter(range(shape.layers))

        def __len__(self) -> int:
            return shape.layers

    mode = planned.modes[0]
    task = case.task(mode)

    generator = torch.Generator().manual_seed(0)

    def random_batch() -> dict[str, torch.Tensor]:
        """All rows as long as the window; ragged: a quarter of it to all of it, the first row all."""
        ids = torch.randint(3, shape.vocab, (case.batch, case.window), generator=generator)
        lengths = torch.randint(case.window // 4, case.window + 1, (case.batch, 1), generator=generator)
        lengths[0] = case.window
        inside = torch.arange(case.window) < lengths if case.ragged else torch.ones_like(ids, dtype=torch.bool)
        return {"input_ids": ids * inside, "attention_mask": inside.long(), "labels": ids.masked_fill(~inside, IGNORE)}

    batches = [random_batch() for _ in range(case.steps)]
    held: list[dict[str, torch.Tensor]] = []
    while len(held) < case.heldout:
        batch = random_batch()
        lengths = batch["attention_mask"].sum(1).tolist()
        held += [{name: rows[row : row + 1, :length] for name, rows in batch.items()} for row, length in enumerate(lengths)]
    held = held[: case.heldout]
    # A probe's worst moment may be quantizing: nothing is on disk for it yet.
    store = directory / ("nf4" if kind == "train" else "nf4-cold")
    shutil.rmtree(directory / "nf4-cold", ignore_errors=True)
    baseline = measure.footprint()
    with measure.Peak("cpu", baseline) as peak:
        loader = UnitLoader(checkpoint, "cpu", dtype, case.quantization, store, case.shape.ljust(64, "0"))
        if kind == "train":
            units, scratch = case.assigned(mode), directory / "spill"
            with open_trainer(loader, units, case.train_spec, Adapter(), task.stream, scratch, task.checkpointing) as trainer:
                train(trainer, batches, case.train_spec, mode.micro_batch)
        else:
            rows = planned.probe_rows
            probe(
                loader, batches[0], held, case.probe_spec, Adapter(), micro_rows=rows.micro_rows, pass_rows=rows.pass_rows,
                progress=collecting(lambda *_: None),
            )  # fmt: skip
    shutil.rmtree(directory / "nf4-cold", ignore_errors=True)
    predicted = task.estimate if kind == "train" else planned.probe
    return {
        "kind": kind, "case": to_json(case), "name": case.name, "choice": choice(case, kind),
        "moment": predicted.moment, "predicted": predicted.peak, "measured": peak.host, "warmed": baseline,
        "breakdown": dict(predicted.rows),
    }  # fmt: skip


def choice(case: Case, kind: str) -> str:
    """What the planner chose."""
    planned = case.plan()
    mode = planned.modes[0]
    if kind == "probe":
        return f"probe, {planned.probe_rows.micro_rows} of {planned.probe_rows.pass_rows} rows"
    task, units = case.task(mode), len(case.assigned(mode))
    text = f"{units:2} units, {'checkpointed' if task.checkpointing else 'kept'}, micro {mode.micro_batch}"
    if case.gradient is Gradient.SUBMODEL:
        return text
    stream = task.stream
    shelves = [size if size < 0 else size // MIB for size in (stream.boundary_bytes, stream.prefix_bytes)]
    return f"{units:2}u m{mode.micro_batch} r{stream.resident} a{stream.ahead:d} h{stream.head:d} b{shelves[0]} p{shelves[1]}" + (
        "" if task.checkpointing else " kept"
    )


def in_fresh_process(case: Case, directory: Path, kind: str) -> dict[str, Any]:
    """One measurement, with the malloc and thread settings of a worker."""
    text = json.dumps({"case": to_json(case), "kind": kind})
    done = subprocess.run(
        [sys.executable, __file__, "--dir", str(directory), "--one", text],
        env=worker_environment(case.threads), stdout=subprocess.PIPE, text=True, check=True,
    )  # fmt: skip
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def refreshed(result: dict[str, Any] | None, case: Case) -> dict[str, Any] | None:
    """An earlier measurement with today's prediction, or None when the planner would now choose otherwise."""
    if result is None or result["case"] != to_json(case):
        return None
    if result["choice"] != choice(case, result["kind"]):
        return None
    planned = case.plan()
    predicted = planned.probe if result["kind"] == "probe" else case.task(planned.modes[0]).estimate
    return {**result, "predicted": predicted.peak, "moment": predicted.moment, "breakdown": dict(predicted.rows)}


def kept(result: dict[str, Any]) -> bool:
    """Whether a result keeps the contract.

    Rows of one length use none of the room that is kept, in bf16, for the compiled kernels of others. In ragged training one
    row of each batch fills its window; in a probe few do, so that only whether it sufficed can be judged.
    """
    predicted, measured, ragged = result["predicted"], result["measured"], result["case"]["ragged"]
    unused = OVERHEAD_KERNELS if result["case"]["dtype"] == "bfloat16" and not ragged else 0
    much = predicted > measured + unused + max(0.15 * measured, 48 * MIB)
    return measured <= predicted and not (much and not (ragged and result["kind"] == "probe"))


def show(result: dict[str, Any]) -> str:
    """One line of the table."""
    predicted, measured = result["predicted"], result["measured"]
    verdict = "ok" if kept(result) else "BROKEN"
    return (
        f"{result['name']:66} {result['choice']:32} {result['moment']:26} {predicted / MIB:8.1f} {measured / MIB:8.1f} "
        f"{(predicted - measured) / MIB:+7.1f} {predicted / measured:6.3f}  {verdict}"
    )


def table(name: str, estimate: Estimate) -> str:
    """A breakdown in one line."""
    return (
        f"{name}: " + ", ".join(f"{what} {size / MIB:.0f}" for what, size in estimate.rows) + f" = {estimate.peak / MIB:.0f} MiB"
    )


def seven_rows() -> None:
    """What the planner says of the large shapes on a 3 GB device (paper: 12 layers of LLaMA2-7B)."""
    for shape in ("llama2-7b", "llama2-13b"):
        case = Case(shape, 2861, 1, 512, NF4)
        planned = case.plan()
        mode = planned.modes[0]
        print(f"{shape}, NF4, 3 GB, 1×512: {mode.units} of {shape_of(CONFIGS[shape]).layers} layers; "
              f"smallest budget {planned.smallest_budget / MIB:.0f} MiB")  # fmt: skip
        print("   " + table(f"training ({mode.train.moment})", mode.train))
        print("   " + table(planned.probe.moment, planned.probe))


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dir", type=Path, default=ROOT / ".cache" / "random")
    parser.add_argument("--results", type=Path, default=ROOT / ".cache" / "planner.jsonl")
    parser.add_argument("--only", default="", help="one setting by its name, or all whose names hold this text")
    parser.add_argument("--redo", action="store_true", help="forget earlier results")
    parser.add_argument("--seven", action="store_true", help="the LLaMA2-7B shape too")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        task = json.loads(given.one)
        print(json.dumps(measure_case(from_json(Case, task["case"]), given.dir, task["kind"])))
        return 0
    if given.redo:
        given.results.unlink(missing_ok=True)
    lines = given.results.read_text().splitlines() if given.results.exists() else []
    known = {(r["name"], r["kind"]): r for r in map(json.loads, lines)}
    broken = 0
    print(f"{'setting':66} {'plan':32} {'worst moment':26} {'predicted':>8} {'measured':>8} {'over':>7} {'ratio':>6}   (MiB)")
    seven_rows()
    every = (*CASES, *(SEVEN if given.seven else ()))
    cases = [case for case in every if given.only == case.name] or [case for case in every if given.only in case.name]
    for kind in ("train", "probe"):
        for case in cases:
            if kind == "probe" and not case.probe:
                continue
            generate(case.shape, given.dir / case.shape, REAL_LAYERS.get(case.shape, 0))
            result = refreshed(known.get((case.name, kind)), case)
            if result is None:
                result = in_fresh_process(case, given.dir, kind)
                given.results.parent.mkdir(parents=True, exist_ok=True)
                with given.results.open("a") as out:
                    out.write(json.dumps(result) + "\n")
            print(show(result), flush=True)
            broken += not kept(result)
    print("the contract holds" if not broken else f"the contract is broken in {broken} settings")
    return 1 if broken else 0


if __name__ == "__main__":
    raise SystemExit(main())
