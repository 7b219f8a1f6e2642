"""A checkpoint of a real model's shape with random weights: honest for memory, loading and speed, never for quality.

    python benchmarks/random_weights.py tinyllama-1.1b DIR [--layers N] [--dtype bf16]

One shard a layer. `--layers N` gives only the first N layers real bytes; the other shards are holes that read as zeros,
so that a 7B shape costs the disk of a few layers.
"""

from __future__ import annotations

import argparse
import json
import struct
from pathlib import Path
from typing import Any

import numpy as np

from fp_client.shapes import CONFIGS, Shape, shape_of

ITEMSIZE = {"bf16": 2, "fp32": 4}
NAMES = {"bf16": "BF16", "fp32": "F32"}


def write_shard(path: Path, tensors: dict[str, tuple[int, ...]], dtype: str, seed: int, hole: bool = False) -> None:
    """One safetensors file, written a few megabytes at a time; vectors are ones, matrices N(0, 0.02)."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, shape in tensors.items():
        size = int(np.prod(shape)) * ITEMSIZE[dtype]
        header[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    generator = np.random.default_rng(seed)
    with path.open("wb") as out:
        out.write(struct.pack("<Q", len(text)) + text)
        if hole:
            out.truncate(8 + len(text) + offset)
            return
        for shape in tensors.values():
            total = int(np.prod(shape))
            for start in range(0, total, 1 << 22):
                count = min(1 << 22, total - start)
                values = (
                    np.ones(count, np.float32)
                    if len(shape) == 1
                    else generator.standard_normal(count, np.float32) * np.float32(0.02)
                )
                out.write(values.tobytes() if dtype == "fp32" else (values.view(np.uint32) >> 16).astype(np.uint16).tobytes())


def layer_tensors(shape: Shape, index: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a llama layer's tensors."""
    prefix = f"model.layers.{index}."
    out: dict[str, tuple[int, ...]] = {f"{prefix}{m.name}.weight": (m.d_out, m.d_in) for m in shape.modules}
    for norm in ("input_layernorm", "post_attention_layernorm"):
        out[f"{prefix}{norm}.weight"] = (shape.hidden,)
    return out


def generate(name: str, directory: Path, layers: int = 0, dtype: str = "bf16") -> Path:
    """Write the checkpoint unless it is there. Only the first `layers` layers (0: all) have real bytes."""
    config = dict(CONFIGS[name])
    shape = shape_of(config)
    if (directory / "model.safetensors.index.json").exists():
        return directory
    directory.mkdir(parents=True, exist_ok=True)
    ends = {"model.embed_tokens.weight": (shape.vocab, shape.hidden), "model.norm.weight": (shape.hidden,)}
    if not shape.tied:
        ends["lm_head.weight"] = (shape.vocab, shape.hidden)
    write_shard(directory / "model-ends.safetensors", ends, dtype, 0)
    where: dict[str, str] = dict.fromkeys(ends, "model-ends.safetensors")
    for index in range(shape.layers):
        shard, tensors = f"model-{index:05d}.safetensors", layer_tensors(shape, index)
        write_shard(directory / shard, tensors, dtype, 1 + index, hole=bool(layers) and index >= layers)
        where.update(dict.fromkeys(tensors, shard))
    (directory / "config.json").write_text(json.dumps({**config, "torch_dtype": {"bf16": "bfloat16", "fp32": "float32"}[dtype]}))
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return directory


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", choices=sorted(CONFIGS))
    parser.add_argument("directory", type=Path)
    parser.add_argument("--layers", type=int, default=0)
    parser.add_argument("--dtype", choices=sorted(ITEMSIZE), default="bf16")
    given = parser.parse_args()
    print(generate(given.shape, given.directory, given.layers, given.dtype))


if __name__ == "__main__":
    main()
