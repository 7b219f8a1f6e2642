"""What the model answers with and without an exported adapter; greedy, so the same every time.

    python examples/answer.py MODEL ADAPTER "What does ... do?"

MODEL: a Hugging Face directory; ADAPTER: what `fp-server export` wrote. Prints one JSON object:
{"without": ..., "with": ..., "largest_logit_change": ...}.
"""

from __future__ import annotations

import json
import sys

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from fp_client.template import prompt

NEW_TOKENS = 48


def main() -> None:
    """Answer twice with one model in memory: adapter on, adapter off."""
    base, adapter, instruction = sys.argv[1:]
    torch.set_num_threads(1)  # a second thread gains little at one token a step, and loses much on a busy machine
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    tuned = PeftModel.from_pretrained(model, adapter).eval()
    inputs = tokenizer(prompt(instruction), return_tensors="pt")

    def answer() -> tuple[str, torch.Tensor]:
        with torch.no_grad():
            logits = tuned(**inputs).logits
            out = tuned.generate(
                **inputs, max_new_tokens=NEW_TOKENS, do_sample=False, temperature=None, top_p=None, top_k=None,
                pad_token_id=tokenizer.eos_token_id,
            )  # fmt: skip
        new = out[0, inputs["input_ids"].shape[1] :]
        return tokenizer.decode(new, skip_special_tokens=True).strip(), logits

    with_text, with_logits = answer()
    with tuned.disable_adapter():
        without_text, without_logits = answer()
    change = float((with_logits - without_logits).abs().max())
    print(json.dumps({"without": without_text, "with": with_text, "largest_logit_change": change}))


if __name__ == "__main__":
    main()
