"""Peak memory and time of the streamed probe and of one training step, above the warmed worker.

    python benchmarks/memory_probe.py probe --model .cache/models/SmolLM2-135M-Instruct
    python benchmarks/memory_probe.py whole --model .cache/models/SmolLM2-135M-Instruct
    python benchmarks/memory_probe.py probe --shape llama2-7b --dir /var/tmp/llama2-7b --quantization nf4 --dtype bfloat16
    python benchmarks/memory_probe.py train --shape llama2-7b --dir /var/tmp/llama2-7b --quantization nf4 --dtype bfloat16 \\
        --rows 1 --length 512 --units 12

`whole` loads the model as transformers does and runs one forward: what the probe is compared with. `--shape` makes a
checkpoint with RANDOM WEIGHTS in `--dir` (llama2-7b: about 13.5 GB on disk; `--layers N` keeps N layers of it). The
measured run is a process of its own, with the malloc and thread settings of a worker; the first probe or training of an NF4 model
also quantizes, `--again` measures the next one in the same process.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

# Passive waiting: with other processes on the cores, OpenMP threads that spin cost most of the time.
ENVIRONMENT = {
    "MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_TRIM_THRESHOLD_": "131072", "OMP_WAIT_POLICY": "PASSIVE",
}  # fmt: skip
LINEAR = (
    "mlp.down_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "self_attn.k_proj",
    "self_attn.o_proj",
    "self_attn.q_proj",
    "self_attn.v_proj",
)
MIB = 1 << 20


def shaped(given: argparse.Namespace) -> Path:
    """The random checkpoint of a shape, generated unless it is there."""
    from benchmarks.random_weights import generate
    from fp_client.shapes import CONFIGS, shape_of

    if given.layers:
        CONFIGS[given.shape] = {**CONFIGS[given.shape], "num_hidden_layers": given.layers}
    shape = shape_of(CONFIGS[given.shape])
    given.dir.mkdir(parents=True, exist_ok=True)
    target = given.dir / f"{given.shape}-{shape.layers}"
    need = int(2.0 * shape.parameters + 0.57 * shape.layers * shape.linear)  # bf16, and its NF4 store
    if not target.exists() and shutil.disk_usage(given.dir).free < need:
        sys.exit(f"{given.dir}: {need / 1e9:.0f} GB of free disk are needed for {given.shape} with {shape.layers} layers")
    return generate(given.shape, target)


def rows(count: int, length: int, vocabulary: int, seed: int = 0) -> dict[str, Any]:
    """Random token rows; the second half of each is the response."""
    import torch

    ids = torch.randint(3, vocabulary, (count, length), generator=torch.Generator().manual_seed(seed))
    labels = ids.clone()
    labels[:, : length // 2] = -100
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def task(given: argparse.Namespace, directory: Path, dtype: Any, store: Path) -> dict[str, Any]:
    """Do the measured work once; what it returns is printed."""
    import torch

    from common.checkpoint import Checkpoint
    from common.types import ProbeSpec, Quantization, TrainSpec, UnitId
    from fp_client.loader import UnitLoader
    from fp_client.probe import probe
    from fp_client.submodel import load_submodel
    from fp_client.train import train

    checkpoint = Checkpoint(directory)
    batch = rows(given.rows, given.length, checkpoint.config["vocab_size"])
    if given.task == "whole":
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype)
        with torch.no_grad():
            return {"loss": float(model(**batch).loss)}
    loader = UnitLoader(checkpoint, given.device, dtype, Quantization(given.quantization), store, checkpoint.stamp())
    if given.task == "probe":
        held = [rows(given.rows, given.length, checkpoint.config["vocab_size"]) for _ in range(given.heldout // given.rows)]
        found = probe(loader, batch, held, ProbeSpec(), micro_rows=given.micro, pass_rows=given.pass_rows)
        return {"loss": round(found.loss, 4), "seconds": round(found.seconds, 1)}
    count = checkpoint.layers
    units = [UnitId(i * count // given.units) for i in range(given.units)]
    spec = TrainSpec(given.steps, given.rows, given.length, 1e-4, given.rank, 2.0 * given.rank, LINEAR, 0)
    submodel = load_submodel(loader, units, spec, checkpointing=not given.no_checkpointing)
    result = train(submodel, [batch] * given.steps, spec, given.micro)
    return {
        "loss_first": result.loss_first,
        "loss_last": result.loss_last,
        "seconds_per_step": round(result.seconds / given.steps, 1),
    }


def measured(given: argparse.Namespace) -> None:
    """Inside the worker-like process: warm up, measure, print one line."""
    import torch

    from common.types import Quantization
    from fp_client.measure import Peak, footprint
    from fp_client.warmup import warm_up

    torch.set_num_threads(given.threads)
    dtype = getattr(torch, given.dtype)
    directory, store = given.model, given.dir / "nf4-store"
    warm_up(given.device, dtype, Quantization(given.quantization))
    warmed = footprint()
    for number in range(2 if given.again else 1):
        begin = time.monotonic()
        with Peak(given.device, warmed) as peak:
            said = task(given, directory, dtype, store)
        out = {
            "task": given.task, "model": directory.name, "random_weights": bool(given.shape), "quantization": given.quantization,
            "dtype": given.dtype, "rows": given.rows, "length": given.length, "run": number + 1,
            "peak_mib": round(peak.bytes / MIB, 1), "warmed_mib": round(warmed / MIB, 1),
            "wall_s": round(time.monotonic() - begin, 1),
        }  # fmt: skip
        print(json.dumps({**out, **said}), flush=True)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=["probe", "train", "whole"])
    parser.add_argument("--model", type=Path, default=ROOT / ".cache/models/SmolLM2-135M-Instruct")
    parser.add_argument("--shape", choices=["tinyllama-1.1b", "llama2-7b", "llama2-13b"])
    parser.add_argument(
        "--dir", type=Path, default=ROOT / ".cache/shapes", help="where random checkpoints and NF4 units are kept"
    )
    parser.add_argument("--layers", type=int, default=0, help="make a model with only this many layers of the shape")
    parser.add_argument("--quantization", choices=["none", "nf4"], default="none")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--micro", type=int, default=1, help="rows at once")
    parser.add_argument("--heldout", type=int, default=8, help="held-out rows of the probe")
    parser.add_argument("--pass-rows", type=int, default=64)
    parser.add_argument("--units", type=int, default=12)
    parser.add_argument("--steps", type=int, default=1)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--no-checkpointing", action="store_true")
    parser.add_argument("--again", action="store_true")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.inside:
        measured(given)
        return
    arguments = [*sys.argv[1:], "--inside"]
    if given.shape:
        arguments += ["--model", str(shaped(given))]
    process = subprocess.run([sys.executable, __file__, *arguments], env={**os.environ, **ENVIRONMENT}, check=False)
    whole = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
    print(f"process high-water mark: {whole:.0f} MiB", file=sys.stderr)
    sys.exit(process.returncode)


if __name__ == "__main__":
    main()
