"""Whole federations of real daemons, with a fault at every named point: see `tests/faults/__main__.py`."""
