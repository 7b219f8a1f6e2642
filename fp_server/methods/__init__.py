"""The methods a run file may name. A new method is one file here and one line in `METHODS`."""

from __future__ import annotations

from fp_server.methods.base import Draw, Method, PlanInputs
from fp_server.methods.fedpruner import FedPruner
from fp_server.methods.random_units import RandomUnits

METHODS: dict[str, Method] = {method.name: method for method in (FedPruner(), RandomUnits())}

__all__ = ["METHODS", "Draw", "Method", "PlanInputs"]
