"""The walls of the package: imports point up the list in the README, and importing does nothing."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "flywheel_ray"

PURE = ["errors", "values", "records", "toolbox", "redaction", "near_duplicates", "splits", "datasets", "formats",
        "lines", "intake", "builds", "shots", "candidates", "scoring", "text_scoring", "breakdown", "ratings", "prices",
        "judge", "stats", "sequences", "results", "labels", "calibration", "leaderboard", "rollout"]  # fmt: skip
SEAMS = ["services", "config", "trial"]
IO = ["stores", "spill", "presidio", "embeddings", "chat", "verdicts", "platforms", "ledger"]
RAY_AND_FACES = ["progress", "preparation", "sweep", "plots", "report", "analysis", "console", "cli_data", "cli_judge",
                 "cli"]  # fmt: skip
LAYERS = [PURE, SEAMS, IO, RAY_AND_FACES]
FORBIDDEN_IN_PURE = {"ray", "httpx", "requests", "socket", "time", "random", "torch", "os", "sqlite3", "subprocess"}


def room_of(path: Path) -> str:
    relative = path.relative_to(PACKAGE)
    return relative.parts[0].removesuffix(".py")


def imports_of(path: Path) -> set[str]:
    """Every module imported anywhere in a file, `from a import b` as both a and a.b."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def rooms_imported(path: Path) -> set[str]:
    parts = (name.split(".") for name in imports_of(path) if name.startswith("flywheel_ray."))
    rooms = {name[1] for name in parts}
    return {room for room in rooms if (PACKAGE / room).is_dir() or (PACKAGE / f"{room}.py").is_file()}


FILES = sorted(p for p in PACKAGE.rglob("*.py") if p.name != "__init__.py" or p.parent != PACKAGE)


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_up(path: Path) -> None:
    room = room_of(path)
    layer = next((i for i, rooms in enumerate(LAYERS) if room in rooms), None)
    assert layer is not None, f"{room} is in no layer: put it in the picture in the README and here"
    allowed = {r for rooms in LAYERS[: layer + 1] for r in rooms}
    if room in ("stores", "platforms"):
        # A store does not know a platform, nor a platform a store; both may use the chat client.
        allowed -= {"stores", "platforms", "ledger"} - {room}
    assert rooms_imported(path) <= allowed


@pytest.mark.parametrize("path", [p for p in FILES if room_of(p) in PURE], ids=lambda p: p.stem)
def test_pure_rooms_reach_nothing_outside(path: Path) -> None:
    outside = {name.split(".")[0] for name in imports_of(path)} & FORBIDDEN_IN_PURE
    if path.stem == "datasets":
        outside -= {"os"}  # Dataset.save writes a folder whole or not at all
    assert not outside


def test_siblings_do_not_know_each_other() -> None:
    for folder in (PACKAGE / "stores", PACKAGE / "platforms"):
        siblings = {p.stem if p.is_file() else p.name for p in folder.iterdir() if not p.name.startswith("_")}
        backends = siblings - {"ingest"}
        for path in folder.rglob("*.py"):
            own = path.relative_to(folder).parts[0].removesuffix(".py")
            if own not in backends:
                continue
            prefix = f"flywheel_ray.{folder.name}."
            others = {n.removeprefix(prefix).split(".")[0] for n in imports_of(path) if n.startswith(prefix)}
            assert not (others & backends) - {own}, path


def test_nothing_imports_the_apps_or_the_experiments() -> None:
    for path in FILES:
        tops = {name.split(".")[0] for name in imports_of(path)}
        assert not tops & {"serve", "experiments", "tests"}, path


def test_import_is_free() -> None:
    """Importing the rooms that every command uses loads neither Ray nor torch, and writes nothing."""
    code = (
        "import sys, flywheel_ray.trial, flywheel_ray.config, flywheel_ray.ledger, flywheel_ray.cli;"
        "loaded = {m.split('.')[0] for m in sys.modules} & {'ray', 'torch', 'transformers', 'matplotlib'};"
        "assert not loaded, loaded"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert not done.stdout
