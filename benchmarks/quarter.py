"""Streamed and stitched training at a quarter of the memory that training the whole model takes.

    python benchmarks/quarter.py --shape llama2-7b --dir .cache/shapes
    python benchmarks/quarter.py --model .cache/models/SmolLM2-135M-Instruct --rows 4 --length 128 --dtype float32 \\
        --quantization none --smallest

The baseline is this project's own loader with all units, checkpointing and chunked loss, on the same batch. Its measured peak
(`--baseline MIB` where it is known) is the whole; the planner then gets a quarter of it (`--share`), or with `--smallest` the
smallest budget it accepts, and what it chooses is trained in a fresh process, above whose warmed footprint nothing more can be
allocated (RLIMIT_DATA), and measured there. `--container IMAGE` runs that process in a container without swap whose memory the
kernel limits to the warmed footprint (the baseline's, or `--warmed MIB`) plus the budget; the image needs nothing but the C
library, Python and the environment are mounted:

    python benchmarks/quarter.py --shape llama2-7b --dir .cache/shapes --container python:3.11-slim

`--shape` uses RANDOM WEIGHTS. Exit code 1 when a peak is over its budget.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from memory_probe import LINEAR, rows, shaped

from common.checkpoint import Checkpoint
from common.types import Gradient, ProbeSpec, Quantization, TrainSpec, UnitId
from fp_client.memory import MIB, Setting
from fp_client.planner import ModePlan, Plan, plan, plan_task
from fp_client.pool import worker_environment
from fp_client.shapes import shape_of

ROOT = Path(__file__).resolve().parent.parent


def spec_of(given: argparse.Namespace, gradient: Gradient) -> TrainSpec:
    """What is trained: LoRA on all linear modules."""
    return TrainSpec(given.steps, given.rows, given.length, 1e-4, given.rank, 2.0 * given.rank, LINEAR, 0, gradient=gradient)


def setting_of(given: argparse.Namespace, checkpoint: Checkpoint) -> Setting:
    """How it is computed."""
    return Setting.of(checkpoint, Quantization(given.quantization), given.dtype, given.threads)


def planned(given: argparse.Namespace, checkpoint: Checkpoint, gradient: Gradient, budget: int) -> Plan:
    """The planner's own choice."""
    probe = ProbeSpec(batch_size=given.rows, sequence_length=given.length)
    return plan(checkpoint.config, setting_of(given, checkpoint), spec_of(given, gradient), probe, 0, budget, 8)


def choice(given: argparse.Namespace, checkpoint: Checkpoint) -> tuple[tuple[UnitId, ...], ModePlan]:
    """The units, spread over the layers, and the mode's plan."""
    layers = checkpoint.layers
    mode = planned(given, checkpoint, Gradient(given.inside), given.budget).modes[0]
    return tuple(UnitId(i * layers // mode.units) for i in range(mode.units)), mode


def inside(given: argparse.Namespace) -> dict[str, Any]:
    """The measured process."""
    import torch

    from fp_client import measure
    from fp_client.loader import UnitLoader
    from fp_client.train import train
    from fp_client.trainers import open_trainer
    from fp_client.warmup import warm_up

    torch.set_num_threads(given.threads)
    dtype, gradient = getattr(torch, given.dtype), Gradient(given.inside)
    warm_up("cpu", dtype, Quantization(given.quantization))
    checkpoint = Checkpoint(given.model)
    spec, shape, setting = spec_of(given, gradient), shape_of(checkpoint.config), setting_of(given, checkpoint)
    batches = [rows(given.rows, given.length, checkpoint.config["vocab_size"]) for _ in range(given.steps)]
    if gradient is Gradient.SUBMODEL:
        units, micro = tuple(UnitId(i) for i in range(checkpoint.layers)), given.rows
    else:
        units, mode = choice(given, checkpoint)
        micro = mode.micro_batch
    task = plan_task(shape, setting, spec, 0, units, micro, True, given.budget)
    warmed, begin = measure.footprint(), time.monotonic()
    if given.budget:
        measure.limit(given.budget)
    with measure.Peak("cpu", warmed) as peak:
        loader = UnitLoader(checkpoint, "cpu", dtype, setting.quantization, given.dir / "nf4-store", checkpoint.stamp())
        with open_trainer(loader, units, spec, {}, task.stream, given.dir / "spill", task.checkpointing) as trainer:
            found = train(trainer, batches, spec, micro)
    return {
        "gradient": "baseline" if gradient is Gradient.SUBMODEL else gradient.value, "model": checkpoint.directory.name,
        "random_weights": bool(given.shape), "units": len(units), "of": checkpoint.layers, "micro_batch": micro,
        "stream": None if gradient is Gradient.SUBMODEL else {name: getattr(task.stream, name) for name in vars(task.stream)},
        "budget_mib": given.budget / MIB, "predicted_mib": task.peak / MIB, "peak_mib": peak.host / MIB,
        "warmed_mib": warmed / MIB, "step_s": found.step_seconds, "wall_s": time.monotonic() - begin,
        "loss_first": found.loss_first, "loss_last": found.loss_last,
        "moment": task.estimate.moment,
        "breakdown_mib": {name: round(size / MIB, 1) for name, size in task.estimate.rows if size},
    }  # fmt: skip


def contained(image: str, limit: int, environment: dict[str, str]) -> list[str]:
    """The command that runs another in a container of `limit` bytes, with this machine's Python and this checkout."""
    mounts = {str(Path(sys.base_prefix)): ":ro", str(ROOT): ""}
    return [
        "docker", "run", "--rm", "--memory", str(limit), "--memory-swap", str(limit), "--workdir", str(ROOT),
        *(f"--volume={path}:{path}{mode}" for path, mode in mounts.items()),
        *(f"--env={name}" for name in sorted(environment) if name not in ("PATH", "HOME")), image,
    ]  # fmt: skip


def measured(given: argparse.Namespace, gradient: Gradient, budget: int) -> dict[str, Any]:
    """One mode in a process of its own."""
    command = [
        sys.executable, str(Path(__file__).resolve()), *sys.argv[1:], "--model", str(given.model), "--inside", gradient.value,
        "--budget", str(budget),
    ]  # fmt: skip
    environment = worker_environment(given.threads)
    if given.container and budget:
        command = [*contained(given.container, int(given.warmed * MIB) + budget, environment), *command]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        sys.exit(f"{gradient.value}: the process ended with {done.returncode}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    print(
        json.dumps({name: round(value, 2) if isinstance(value, float) else value for name, value in result.items()}), flush=True
    )
    return result


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a checkpoint's directory")
    parser.add_argument("--shape", choices=["tinyllama-1.1b", "llama2-7b"], help="random weights of that shape, below --dir")
    parser.add_argument("--layers", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument(
        "--dir", type=Path, default=Path(".cache/shapes"), help="random checkpoints, NF4 units, spilled activations"
    )
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16")
    parser.add_argument("--quantization", choices=["none", "nf4"], default="nf4")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--share", type=float, default=0.25)
    parser.add_argument("--smallest", action="store_true", help="the planner's smallest budget instead of a share")
    parser.add_argument("--baseline", type=float, default=0.0, help="the baseline's peak in MiB, measured earlier")
    parser.add_argument("--modes", nargs="+", choices=["streamed", "stitched"], default=["streamed", "stitched"])
    parser.add_argument("--container", default="", metavar="IMAGE", help="run under a container's memory limit")
    parser.add_argument("--warmed", type=float, default=0.0, help="MiB a warmed process holds, where the baseline's are known")
    parser.add_argument("--inside", help=argparse.SUPPRESS)
    parser.add_argument("--budget", type=int, default=0, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.inside:
        print(json.dumps(inside(given)))
        return 0
    given.model = shaped(given) if given.shape else given.model
    checkpoint = Checkpoint(given.model)
    if given.container and given.baseline and not given.warmed:
        parser.error("--container with --baseline needs --warmed")
    whole = given.baseline * MIB
    if not whole:
        found = measured(given, Gradient.SUBMODEL, 0)
        whole, given.warmed = found["peak_mib"] * MIB, given.warmed or found["warmed_mib"]
    over = 0
    for gradient in map(Gradient, given.modes):
        least = dict(planned(given, checkpoint, gradient, 0).smallest)[gradient]
        budget = least if given.smallest else int(given.share * whole)
        found = measured(given, gradient, budget)
        share = 100 * found["peak_mib"] * MIB / whole
        print(f"{gradient.value}: {found['peak_mib']:.0f} of {budget / MIB:.0f} MiB, {share:.1f} % of the baseline's "
              f"{whole / MIB:.0f}; the planner's smallest budget is {least / MIB:.0f} MiB", flush=True)  # fmt: skip
        over += found["peak_mib"] * MIB > budget
    return 1 if over else 0


if __name__ == "__main__":
    raise SystemExit(main())
