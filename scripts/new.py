"""Writes a task of your own that trains at once, out of scripts/skeleton/: make new NAME=houses."""

import keyword
import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
SKELETON = Path(__file__).parent / "skeleton"
READ_OTHERWISE = {"null", "true", "false", "yes", "no", "on", "off", "nan", "inf"}  # by YAML or Hydra


def check_name(name: str) -> None:
    """Refuses what cannot be the name of a Python package and of a YAML file.

    Raises:
        ValueError: What a name must be, and what came.
    """
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
        raise ValueError(f"NAME must be snake_case, such as houses or house_prices, got {name!r}.")
    if keyword.iskeyword(name) or name in READ_OTHERWISE:
        raise ValueError(f"NAME must not be a word that Python, YAML or Hydra keeps for itself, got {name!r}.")


def new_task(name: str, root: Path = ROOT) -> list[Path]:
    """Writes model, data, configuration, experiment and test of a task.

    Args:
        name: The task's, in snake_case.
        root: The project's folder.

    Returns:
        The files.

    Raises:
        ValueError: It cannot be a name, or is taken; nothing has been written.
    """
    check_name(name)
    sources = sorted(file for file in SKELETON.rglob("*") if file.suffix in (".py", ".yaml"))
    targets = [root / str(file.relative_to(SKELETON)).replace("your_task", name) for file in sources]
    packages = [target.parent for target in targets if target.name == "__init__.py"]
    modules = [package.with_suffix(".py") for package in packages]  # which the package would hide
    for path in (*packages, *modules, *targets):
        if path.exists():
            raise ValueError(f"NAME must be a new one, got {name!r}: {path.relative_to(root)} is there already.")
    class_name = "".join(word.capitalize() for word in name.split("_"))
    for source, target in zip(sources, targets, strict=True):
        target.parent.mkdir(parents=True, exist_ok=True)
        text = source.read_text(encoding="utf-8").replace("your_task", name).replace("YourTask", class_name)
        target.write_text(text, encoding="utf-8")
    return targets


def main(name: str) -> None:
    """Writes the task, and says what comes next."""
    try:
        files = new_task(name)
    except ValueError as error:
        raise SystemExit(f"error: {error}") from None
    for file in files:
        print(file.relative_to(ROOT))
    print(f"\nIt trains on data that it makes up: python scripts/train.py experiment={name}")


if __name__ == "__main__":
    main(*sys.argv[1:2] or [""])
