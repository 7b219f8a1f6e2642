"""How faithful each gradient mode is: the cosine of its LoRA gradient with the full model's, over FDLO/IALS assignments.

    python benchmarks/fidelity.py --data alpaca.jsonl --out fidelity.jsonl

For each of `--assignments` draws: the device code probes one batch of training rows, FDLO and IALS choose the units, and
the gradients of the plain submodel, the stitched one and the streamed full model on ANOTHER batch are compared with the
full model in memory (all layers loaded, the same loader and loss). With `--steps N` the comparison is made again after N
AdamW steps of stitched training on further batches, all anchored at the start, as a round does it. Lines are written as
they come, and an assignment that is there already is not measured again.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np
import torch

from common.checkpoint import Checkpoint
from common.types import Gradient, Part, ProbeSpec, TrainSpec, UnitId, model_units
from fp_client import batches as data
from fp_client.data import DataSource
from fp_client.fidelity import Fidelity, fidelity, gradients
from fp_client.loader import UnitLoader
from fp_client.memory import StreamPlan
from fp_client.probe import probe
from fp_client.shapes import shape_of
from fp_client.submodel import Submodel, load_submodel
from fp_client.tasks import load_tokenizer
from fp_client.template import IGNORE
from fp_client.trainers import open_trainer
from fp_server.methods import METHODS, PlanInputs

MODES = (Gradient.SUBMODEL, Gradient.STITCHED, Gradient.STREAMED)


class Reference:
    """The full model in memory with LoRA on all layers: what every mode is compared with."""

    def __init__(self, loader: UnitLoader, spec: TrainSpec, layers: int) -> None:
        self.model: Submodel = load_submodel(loader, [UnitId(i) for i in range(layers)], spec)
        self.names = [
            (layer, module, factor)
            for layer, targets in sorted(self.model.targets.items())
            for module in targets
            for factor in "AB"
        ]

    def gradient(self, wanted: list[tuple[int, str, str]], values: list[torch.Tensor], batch: data.Batch) -> list[torch.Tensor]:
        """The gradient over the wanted factors, which first take the given values; B of all others is 0."""
        by_name = dict(zip(self.names, self.model.trainable, strict=True))
        for (_, _, factor), parameter in by_name.items():
            if factor == "B":
                parameter.data.zero_()
        for name, value in zip(wanted, values, strict=True):
            by_name[name].data.copy_(value)
        found, _ = gradients(self.model, batch, batch["input_ids"].shape[0])
        return [gradient for name, gradient in zip(self.names, found, strict=True) if name in set(wanted)]


def factor_names(units: tuple[UnitId, ...], targets: tuple[str, ...], layers: int) -> list[tuple[int, str, str]]:
    """The trainable factors of an assignment, in a trainer's order."""
    from fp_client.units import keep

    return [
        (layer, module, factor)
        for layer, kept in keep(units, layers, targets).items()
        for module in kept.targets
        for factor in "AB"
    ]


def assignment(
    given: argparse.Namespace, loader: UnitLoader, dataset: data.Dataset, tokenizer: Any, number: int
) -> tuple[UnitId, ...]:
    """The units of one device in one round: a probe of its own, FDLO and IALS."""
    part = Part.ATTENTION if given.components else Part.LAYER
    spec = ProbeSpec(part=part, batch_size=4, sequence_length=given.window, seed=number)
    found = probe(loader, data.probe_batch(dataset, spec, tokenizer), [], spec)
    units = model_units(part, loader.checkpoint.layers)
    capacity = given.units * (2 if given.components else 1)
    inputs = PlanInputs(
        found.similarity, found.in_out, capacity, (1,) * len(units), None, given.eigenvectors, group_sizes=given.group_sizes
    )
    draw = METHODS[given.method].plan(inputs, np.random.default_rng(number))
    return tuple(units[index] for index in draw.units)


def measure(given: argparse.Namespace, number: int, context: dict[str, Any]) -> dict[str, Any]:
    """One assignment: a line of the results."""
    loader, dataset, tokenizer, spec = context["loader"], context["dataset"], context["tokenizer"], context["spec"]
    layers = loader.checkpoint.layers
    units = assignment(given, loader, dataset, tokenizer, number)
    # Rows of another seed than the probe's: nothing is judged on what anything was measured on.
    spec = replace(spec, seed=1000 + number, steps=given.steps + 1)
    judged = list(itertools.islice(data.train_batches(dataset, spec, tokenizer), given.steps + 1))
    names = factor_names(units, spec.targets, layers)
    line: dict[str, Any] = {"assignment": number, "units": [unit.label for unit in units]}
    for mode in MODES:
        begin = time.monotonic()
        with open_trainer(
            loader, units, replace(spec, gradient=mode), {}, StreamPlan(ahead=True), Path(given.scratch)
        ) as trainer:
            mine, loss = gradients(trainer, judged[0], spec.batch_size)
            full = context["reference"].gradient(names, [p.detach() for p in trainer.trainable], judged[0])
            found = fidelity(mine, full, units, layers, spec)
            line[mode.value] = {**as_dict(found), "loss": loss, "seconds": time.monotonic() - begin}
            if given.steps and mode is Gradient.STITCHED:
                line["after"] = as_dict(later(trainer, judged, units, names, spec, context["reference"]))
    return line


def later(
    trainer: Any, judged: list[data.Batch], units: tuple[UnitId, ...], names: Any, spec: TrainSpec, reference: Reference
) -> Fidelity:
    """The fidelity of the round's last step, after training on the ones before."""
    trainer.begin(judged, spec.batch_size)
    optimizer = torch.optim.AdamW(trainer.trainable, lr=spec.learning_rate, weight_decay=0.0)
    for step, batch in enumerate(judged):
        counted = int((batch["labels"][:, 1:] != IGNORE).sum())
        trainer.gradients(step, batch, spec.batch_size, counted)
        if step + 1 == len(judged):
            break
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    mine = [parameter.grad.detach().clone() for parameter in trainer.trainable]
    full = reference.gradient(names, [p.detach() for p in trainer.trainable], judged[-1])
    return fidelity(mine, full, units, len(reference.model.targets), spec)


def as_dict(found: Fidelity) -> dict[str, Any]:
    """Plain values."""
    return {"overall": found.overall, "units": list(found.units)}


def report(lines: list[dict[str, Any]]) -> None:
    """A row a mode: mean, median, least and most over the assignments."""
    print(f"{len(lines)} assignments\n{'mode':24} {'mean':>8} {'median':>8} {'least':>8} {'most':>8} {'loss':>8} {'seconds':>8}")
    rows = [(mode.value, [line[mode.value] for line in lines]) for mode in MODES]
    rows += [("stitched, last step", [line["after"] for line in lines if "after" in line])]
    for name, found in rows:
        if found:
            values = [one["overall"] for one in found]
            loss = f"{statistics.fmean(one['loss'] for one in found):8.3f}" if "loss" in found[0] else " " * 8
            seconds = f"{statistics.median(one['seconds'] for one in found):8.1f}" if "seconds" in found[0] else ""
            shown = (statistics.fmean(values), statistics.median(values), min(values), max(values))
            print(f"{name:24} {' '.join(f'{value:8.4f}' for value in shown)} {loss} {seconds}")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=ROOT / ".cache/models/SmolLM2-135M-Instruct")
    parser.add_argument("--data", required=True, help="instructions as .json or .jsonl (Alpaca form)")
    parser.add_argument("--assignments", type=int, default=20)
    parser.add_argument("--units", type=int, default=8, help="whole layers")
    parser.add_argument("--components", action="store_true", help="twice as many components instead")
    parser.add_argument("--method", choices=sorted(METHODS), default="fedpruner")
    parser.add_argument("--eigenvectors", choices=["k", "k-1"], default="k")
    parser.add_argument("--group-sizes", choices=["free", "even"], default="even")
    parser.add_argument("--window", type=int, default=192)
    parser.add_argument("--steps", type=int, default=0, help="judge stitched again after so many steps")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--scratch", default=str(ROOT / ".cache/spill"))
    parser.add_argument("--out", type=Path, default=ROOT / ".cache/fidelity.jsonl")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    tokenizer = load_tokenizer(str(given.model))
    dataset = data.load_dataset(DataSource(given.data, on_long="drop"), tokenizer, given.window)
    checkpoint = Checkpoint(given.model)
    modules = tuple(sorted(module.name for module in shape_of(checkpoint.config).modules))
    spec = TrainSpec(1, 4, given.window, given.lr, 16, 32.0, modules, 0)
    loader = UnitLoader(checkpoint, "cpu", getattr(torch, given.dtype))
    context = {
        "loader": loader, "dataset": dataset, "tokenizer": tokenizer, "spec": spec,
        "reference": Reference(loader, spec, checkpoint.layers),
    }  # fmt: skip
    lines = [json.loads(text) for text in given.out.read_text().splitlines()] if given.out.exists() else []
    options = {key: str(value) for key, value in vars(given).items() if key not in ("out", "scratch", "assignments", "threads")}
    if other := next((line for line in lines if line.get("options") != options), None):
        sys.exit(f"error: {given.out} holds assignment {other['assignment'] + 1} measured with other options; give another --out")
    for number in range(given.assignments):
        if number in {line["assignment"] for line in lines}:
            continue
        line = {**measure(given, number, context), "options": options}
        lines.append(line)
        given.out.parent.mkdir(parents=True, exist_ok=True)
        with given.out.open("a") as out:
            out.write(json.dumps(line) + "\n")
        shown = ", ".join(f"{mode.value} {line[mode.value]['overall']:+.4f}" for mode in MODES)
        print(f"{number + 1:3} of {given.assignments}: layers {','.join(line['units'])}: {shown}", flush=True)
    report(lines)


if __name__ == "__main__":
    main()
