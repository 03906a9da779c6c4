"""The total order of the tiers: a module imports from its own tier and from those below it, and from nowhere else."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import trioserve

PACKAGE = Path(trioserve.__file__).parent

# From the top down; those in one row are independent of each other. A tier is a folder, or a file of the package.
ORDER = (
    ("cli",),
    ("supervisor",),
    ("worker",),
    ("http",),
    ("middleware", "static"),
    ("asgi",),
    ("structure",),
    ("observe",),
    ("net",),
    ("config", "errors", "signals", "streams"),
)
RANK = {tier: rank for rank, tiers in enumerate(ORDER) for tier in tiers}

# Outside the order: the package itself, its entry point, and the tools for tests, which serve whole workers.
OUTSIDE = {"__init__", "__main__", "testing"}

# The package, as something to be named: its version and where it lies.
ABOUT_THE_PACKAGE = {"trioserve", "trioserve.__version__"}

# `errors` imports nothing of ours, `config` may raise its errors.
ALSO_ALLOWED = {("config", "errors")}


def tier_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE).parts
    return parts[0].removesuffix(".py")


MODULES = sorted(path for path in PACKAGE.rglob("*.py") if tier_of(path) not in OUTSIDE)


def imports_of(path: Path) -> Iterator[tuple[int, str]]:
    """Every import that runs, also inside functions, as (line, dotted name); not those for type checkers only."""
    pending: list[ast.AST] = [ast.parse(path.read_text(encoding="utf-8"))]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            pending += node.orelse
            continue
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            assert node.module is not None
            for alias in node.names:
                yield node.lineno, f"{node.module}.{alias.name}"
        pending += ast.iter_child_nodes(node)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_module_imports_only_from_its_own_tier_and_from_lower_ones(path: Path) -> None:
    tier = tier_of(path)
    wrong = []
    for line, name in imports_of(path):
        parts = name.split(".")
        if parts[0] != "trioserve":
            continue
        imported = parts[1] if len(parts) > 1 else ""
        if imported == tier or name in ABOUT_THE_PACKAGE:
            continue
        assert imported in RANK, f"{path}:{line} imports {name}, which has no place in the order"
        if RANK[imported] <= RANK[tier] and (tier, imported) not in ALSO_ALLOWED:
            wrong.append(f"line {line} imports {name}: {imported} is not below {tier}")
    assert not wrong, "\n".join(wrong)


def test_every_file_of_the_package_has_a_place() -> None:
    assert {tier_of(path) for path in MODULES} <= RANK.keys()
    assert len(MODULES) > 30


def test_private_names_stay_in_their_module() -> None:
    """`from x import _y` says that y belongs elsewhere."""
    wrong = [
        f"{path.relative_to(PACKAGE)}:{line} imports {name}"
        for path in MODULES
        for line, name in imports_of(path)
        if name.startswith("trioserve.") and name.rpartition(".")[2].startswith("_") and "__" not in name
    ]
    assert not wrong, "\n".join(wrong)
