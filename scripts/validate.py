"""Syntax and imports of the package where torch is not installed: ``python3 scripts/validate.py [--json]``.

Compiles every file of the package, then imports every module of it with torch hidden, as on a machine without it.
Modules of rooms that see no tensors must come up; of the others it is told which need torch.  Exits with 1 where
anything else went wrong.  Runs wherever the other dependencies are installed, torch or no torch.
"""

import argparse
import importlib
import json
import sys
import traceback
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "helix_gateway"
HIDDEN = frozenset({"torch", "torch_directml"})
FREE_OF_TORCH = ("cli", "gateway", "engine", "text", "core", "telemetry")
"""The rooms that never see tensors."""


class Without:
    """A finder of modules that acts as if some packages were not installed."""

    def __init__(self, finder: Any) -> None:
        self._finder = finder

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """What the finder says, of what is not hidden."""
        if name.partition(".")[0] in HIDDEN:
            return None
        spec: ModuleSpec | None = self._finder.find_spec(name, path, target)
        return spec

    def __getattr__(self, name: str) -> Any:
        return getattr(self._finder, name)


@dataclass
class Report:
    """What was found, by module."""

    free: list[str] = field(default_factory=list)
    """Come up without torch."""
    need_torch: list[str] = field(default_factory=list)
    """Do not, and may not have to."""
    wrong: dict[str, str] = field(default_factory=dict)
    """What went wrong with those that had to, or for another reason than torch."""
    untried: list[str] = field(default_factory=list)
    """Want some other dependency that is not installed."""
    missing: list[str] = field(default_factory=list)
    """Those dependencies, as modules."""


def files(package: Path) -> list[Path]:
    """Every source of the package."""
    return sorted(package.rglob("*.py"))


def module_of(file: Path, root: Path) -> str:
    """``helix_gateway/cli/main.py`` → ``helix_gateway.cli.main``"""
    parts = file.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def check_syntax(sources: list[Path], root: Path, report: Report) -> None:
    """Compile every file, without writing anything."""
    for file in sources:
        try:
            compile(file.read_bytes(), str(file), "exec")
        except (SyntaxError, ValueError) as error:
            report.wrong[module_of(file, root)] = f"{type(error).__name__}: {error}"


def check_imports(names: list[str], report: Report) -> None:
    """Import every module, torch hidden."""
    sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]
    for name in names:
        try:
            importlib.import_module(name)
        except ModuleNotFoundError as error:
            _note_missing(name, error, report)
        except Exception as error:  # noqa: BLE001 - whatever a module raises when it is imported is what is looked for
            report.wrong[name] = traceback.format_exception_only(error)[-1].strip()
        else:
            report.free.append(name)


def _note_missing(name: str, error: ModuleNotFoundError, report: Report) -> None:
    room = name.partition(".")[2].partition(".")[0]
    wanted = (error.name or "").partition(".")[0]
    if wanted == PACKAGE:
        report.wrong[name] = str(error)
    elif wanted not in HIDDEN:
        report.untried.append(name)
        report.missing = sorted({*report.missing, wanted})
    elif room in FREE_OF_TORCH:
        report.wrong[name] = f"needs {error.name}, which {room}/ must not"
    else:
        report.need_torch.append(name)


def main() -> int:
    """Check everything; 0 if all is well."""
    parser = argparse.ArgumentParser(description="Syntax and imports of the package, with torch hidden.")
    parser.add_argument("--json", action="store_true", help="for programs")
    parser.add_argument("--root", type=Path, default=ROOT, help="folder that holds the package")
    options = parser.parse_args()
    sys.path.insert(0, str(options.root))
    sources = files(options.root / PACKAGE)
    report = Report()
    check_syntax(sources, options.root, report)
    # `__main__` runs the command when it is imported.
    names = [module_of(file, options.root) for file in sources if file.name != "__main__.py"]
    check_imports([name for name in names if name not in report.wrong], report)
    print(json.dumps(asdict(report), indent=1) if options.json else told(report))
    return 1 if report.wrong or report.untried else 0


def told(report: Report) -> str:
    """The report for a person."""
    lines = [f"{len(report.free)} modules come up without torch; {len(report.need_torch)} need it:"]
    lines += [f"  {name}" for name in report.need_torch]
    lines += [f"WRONG {name}: {why}" for name, why in report.wrong.items()]
    if report.untried:
        lines.append(
            f"WRONG {len(report.untried)} modules could not be tried without {', '.join(report.missing)}: install Helix "
            "first (python3 scripts/check.py does) and use its Python, .venv/bin/python."
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
