"""The Python documentation set: the installed Python's own docstrings as an instruction set, in six partitions.

No download. Each public function or method of a chosen standard-library module becomes one example in Alpaca
form: the instruction names it with its signature, the response is its docstring, cut at the end of a
paragraph or sentence so that prompt and response fit a window of tokens. A partition is a handful of
related modules, so the devices' data differ as data on real devices do (non-IID). The same Python version
gives the same set.
"""

from __future__ import annotations

import importlib
import inspect
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

PARTITIONS: dict[str, tuple[str, ...]] = {
    "text": ("string", "textwrap", "re", "difflib", "html", "shlex", "json", "csv", "configparser", "locale", "cmd"),
    "numbers": ("math", "cmath", "statistics", "random", "fractions", "decimal", "operator", "hashlib", "hmac", "secrets"),
    "files": ("os", "shutil", "pathlib", "glob", "tempfile", "fileinput", "filecmp", "zipfile", "tarfile", "gzip", "io"),
    "network": ("socket", "ssl", "urllib.parse", "urllib.request", "http.client", "email.message", "smtplib", "ftplib"),
    "code": ("ast", "inspect", "dis", "tokenize", "types", "typing", "traceback", "pdb", "doctest", "unittest", "pickle"),
    "time": ("asyncio", "threading", "queue", "subprocess", "sched", "datetime", "time", "calendar", "functools", "heapq"),
}
"""Device name -> the modules whose documentation it holds. No module is in two partitions."""

LONGEST_SIGNATURE = 72
"""Characters; a longer signature is shown by its parameters' names alone."""
SHORTEST_ANSWER = 24
"""Characters; a shorter docstring ("See above.") teaches nothing."""


@dataclass(frozen=True)
class Row:
    """One example in Alpaca form."""

    instruction: str
    input: str
    output: str


Fits = Callable[[Row], bool]
"""Whether an example is short enough, prompt and response together."""


def partitions(fits: Fits) -> dict[str, list[Row]]:
    """All partitions. An answer that occurs twice is kept once, in the first partition that has it."""
    seen: set[str] = set()
    return {name: list(_rows(modules, fits, seen)) for name, modules in PARTITIONS.items()}


def write(rows: list[Row], path: Path) -> None:
    """JSON lines, as `fp-client` reads them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(asdict(row), ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def window_check(tokenizer_file: Path, window: int, prompt: Callable[[str, str], str]) -> Fits:
    """Counts tokens with a model's own ``tokenizer.json``: `prompt` of instruction and input, the answer, and an EOS."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(tokenizer_file))

    def fits(row: Row) -> bool:
        texts = (prompt(row.instruction, row.input), row.output)
        return sum(len(tokenizer.encode(text, add_special_tokens=False).ids) for text in texts) + 1 <= window

    return fits


def _rows(modules: tuple[str, ...], fits: Fits, seen: set[str]) -> Iterator[Row]:
    for module_name in modules:
        try:
            module = importlib.import_module(module_name)
        except ImportError:  # a Python built without, say, ssl
            continue
        for name, function in sorted(_functions(module).items()):
            instruction = f"What does the Python function `{module_name}.{name}{_signature(function, '.' in name)}` do?"
            answer = _answer(inspect.getdoc(function) or "", instruction, fits)
            if answer is not None and answer not in seen:
                seen.add(answer)
                yield Row(instruction, "", answer)


def _functions(module: ModuleType) -> dict[str, Any]:
    """Public functions, and public methods of public classes, that are the module's own: dotted name -> object."""
    found: dict[str, Any] = {}
    for name, value in vars(module).items():
        if name.startswith("_") or not _own(value, module):
            continue
        if inspect.isclass(value):
            methods = {f"{name}.{key}": _plain(member) for key, member in vars(value).items() if not key.startswith("_")}
            found |= {key: member for key, member in methods.items() if inspect.isroutine(member)}
        elif inspect.isroutine(value):
            found[name] = value
    return found


def _own(value: Any, module: ModuleType) -> bool:
    # C accelerators (`_heapq`), platform modules (`posix` for os) and submodules (`asyncio.queues`) count as the module's own.
    home = getattr(value, "__module__", None) or ""
    package = module.__name__.split(".")[0]
    return home.split(".")[0].lstrip("_") == package or (package == "os" and home == "posix") or home == "_" + package


def _plain(member: Any) -> Any:
    return member.__func__ if isinstance(member, staticmethod | classmethod) else member


def _signature(function: Any, method: bool) -> str:
    try:
        signature = inspect.signature(function)
    except (ValueError, TypeError, NameError):  # written in C, or with annotations that don't evaluate
        return ""
    parameters = list(signature.parameters.values())
    if method and parameters and parameters[0].name in ("self", "cls"):
        del parameters[0]
    bare = [p.replace(annotation=inspect.Parameter.empty) for p in parameters]
    text = str(inspect.Signature(bare))
    # A default shown as <object at 0x7f…> differs from process to process.
    if len(text) <= LONGEST_SIGNATURE and "<" not in text:
        return text
    stars: dict[Any, str] = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}
    return "(" + ", ".join(stars.get(p.kind, "") + p.name for p in bare) + ")"


def _answer(doc: str, instruction: str, fits: Fits) -> str | None:
    """The longest beginning of a docstring that fits: whole paragraphs, else whole sentences; None when none does."""
    text = inspect.cleandoc(doc).strip()
    ends = [len(text), *(m.start() for m in re.finditer(r"\n\s*\n", text))]
    first = min(ends)
    ends += [m.end() for m in re.finditer(r"[.!?](?=\s)", text[:first])]
    for end in sorted(set(ends), reverse=True):
        part = text[:end].rstrip()
        if part.endswith(":") or len(part) < SHORTEST_ANSWER:
            continue
        if fits(Row(instruction, "", part)):
            return part
    return None
