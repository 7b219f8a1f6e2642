"""On real weights: a run, the exported adapter, and the merged model against the server's ledger."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from fp_server.exporting import open_run
from fp_server.ledger import open_ledger, read_delta
from fp_server.lowrank import Dense
from tests.integration.federation import Federation, write_data

pytestmark = pytest.mark.weights
PROMPT = "Below is an instruction that describes a task.\n\n### Instruction:\nName three colours.\n\n### Response:\n"


def ledger_model(federation: Federation, model: Path):  # type: ignore[no-untyped-def]
    """The oracle: base weights plus the server's ledger, added densely in memory."""
    from transformers import AutoModelForCausalLM

    full = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    changed = 0
    with open_run(federation.server_dir, "run") as (machine, store), torch.no_grad():
        for layer, ref in machine.ledger.items():
            with open_ledger(store.path(ref.digest)) as file:
                for module in machine.manifest.modules:
                    delta = read_delta(file, layer, module)
                    dense = delta.w if isinstance(delta, Dense) else delta.b @ delta.a
                    full.get_submodule(f"model.layers.{layer}.{module.name}").weight += torch.from_numpy(dense)
                    changed += bool(abs(dense).max() > 0)
    assert changed > 0
    return full


def greedy(model, tokenizer) -> tuple[torch.Tensor, list[int]]:  # type: ignore[no-untyped-def]
    ids = tokenizer(PROMPT, return_tensors="pt")
    with torch.no_grad():
        logits = model(**ids).logits
        text = model.generate(**ids, max_new_tokens=24, do_sample=False)
    return logits, text[0].tolist()


def test_export_and_merge_equal_the_ledger(federate: Callable[..., Federation], real_model: Path, tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    federation = federate(real_model, "smollm2")
    federation.start_server()
    for seed, (device, budget) in enumerate({"small": "260MB", "large": "420MB"}.items()):
        federation.add_device(device, write_data(federation.root / f"{device}.jsonl", 24, seed), budget)
        federation.start_device(device)
    federation.run_cli(
        "fp-server", "start", federation.run_file("run", train='gradient = "submodel"'), "--dir", federation.server_dir
    )
    status = federation.wait_state(seconds=800)
    units = {len(m["units"]) for m in status["history"][0]["devices"].values()}
    assert len(units) == 2, "two budgets, two depths"
    federation.kill("server")
    federation.run_cli("fp-server", "export", "run", "--out", tmp_path / "adapter", "--dir", federation.server_dir)
    federation.run_cli("fp-client", "merge", real_model, tmp_path / "adapter", tmp_path / "merged")

    tokenizer = AutoTokenizer.from_pretrained(real_model)
    expected, text = greedy(ledger_model(federation, real_model), tokenizer)
    base = AutoModelForCausalLM.from_pretrained(real_model, dtype=torch.float32)
    untouched, _ = greedy(base, tokenizer)
    assert (untouched - expected).abs().max() > 1e-2, "the adapter must do something, or this test shows nothing"
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning)  # peft 0.21 asks transformers 5 for an old attribute
        adapted = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    for name, model in {"adapter": adapted, "merged": AutoModelForCausalLM.from_pretrained(tmp_path / "merged")}.items():
        logits, said = greedy(model, tokenizer)
        assert (logits - expected).abs().max() < 1e-3, name
        assert said == text, name
