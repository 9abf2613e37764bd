"""Build the package, check it, install it into an environment of its own, and use it from outside the repository.

Its dependencies are those of the environment that runs this: the new one sees them on its path, and nothing is
downloaded but what builds the package. So that this hides no dependency which the metadata lacks, what the modules
import is held against them.
"""

from __future__ import annotations

import ast
import email
import os
import re
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import time
import venv
import zipfile
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DIST = ROOT / "dist"
# Packages that are imported and come with a requirement that cannot do without them.
COMES_WITH = {"rich": "typer", "scipy": "scikit-learn", "yaml": "huggingface-hub"}
sys.path.insert(0, str(ROOT / "tests" / "docs"))


def run(*command: object, cwd: Path = ROOT, **more: str) -> str:
    """Run a command and return what it wrote to stdout; one that fails ends the program."""
    print("+", *command, flush=True)
    env = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "VIRTUAL_ENV")} | more
    done = subprocess.run([str(part) for part in command], cwd=cwd, env=env, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(f"{done.stdout}\n{command[0]} failed with exit code {done.returncode}.")
    return done.stdout


def build() -> Path:
    """Build sdist and wheel, check metadata and contents, and return the wheel."""
    for old in DIST.glob("semu_peft-*"):
        old.unlink()
    run(sys.executable, "-m", "build", "--outdir", DIST)
    files = sorted(DIST.glob("semu_peft-*"))
    run(sys.executable, "-m", "twine", "check", "--strict", *files)
    wheel = next(file for file in files if file.suffix == ".whl")
    inside = set(zipfile.ZipFile(wheel).namelist())
    with tarfile.open(next(file for file in files if file.name.endswith(".tar.gz"))) as archive:
        source = {name.partition("/")[2] for name in archive.getnames()}
    packages = {
        str(path.relative_to(ROOT)) for room in ("semu_peft", "semu_cli") for path in (ROOT / room).rglob("*.py")
    }
    packages |= {"semu_peft/py.typed", "semu_cli/py.typed"}
    for name, found in (("wheel", inside), ("sdist", source)):
        if missing := packages - found:
            sys.exit(f"The {name} lacks {sorted(missing)}.")
        if strange := {path for path in found if path.startswith(("tests", "benchmarks", "docs", "examples"))}:
            sys.exit(f"The {name} has {sorted(strange)}, which belong to the repository alone.")
    check_dependencies(wheel)
    return wheel


def check_dependencies(wheel: Path) -> None:
    """End the program where the wheel imports what its metadata do not require.

    What is imported with a module must be required without an extra, what a function imports at least with one.
    """
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        metadata = email.message_from_bytes(archive.read(next(name for name in names if name.endswith("/METADATA"))))
        modules = {name: ast.parse(archive.read(name)) for name in names if name.endswith(".py")}
    required: dict[bool, set[str]] = {True: set(), False: set()}
    for line in metadata.get_all("Requires-Dist", []):
        required["extra ==" not in line].add(_normal(re.match(r"[\w.-]+", line)[0]))  # type: ignore[index]
    own, known = {name.partition("/")[0] for name in modules}, packages_distributions()
    missing = set()
    for name, tree in modules.items():
        for package, at_once in _imports(tree):
            if package in own or package in sys.stdlib_module_names:
                continue
            enough = required[True] | (set() if at_once else required[False])
            gives = known.get(package, [package]) + [COMES_WITH.get(package, package)]
            if not enough & set(map(_normal, gives)):
                missing.add(f"{name} imports {package}" + (" at once" if at_once else ""))
    if missing:
        sys.exit(
            "The wheel's metadata do not require what its modules import:\n  " + "\n  ".join(sorted(missing)) + "\n"
            "Add it to `dependencies` in pyproject.toml, or to an extra and import it inside the function."
        )  # fmt: skip


def _imports(tree: ast.AST, at_once: bool = True) -> Iterator[tuple[str, bool]]:
    """The packages that a module imports, and whether it does so when it is imported itself."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name.partition(".")[0], at_once) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield (node.module or "").partition(".")[0], at_once
        else:
            later = isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda, ast.Try))
            for_types = isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
            yield from _imports(node, at_once and not later and not for_types)


def _normal(name: str) -> str:
    """A distribution's name as its index writes it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def install(wheel: Path, folder: Path) -> Path:
    """Install the wheel into a new environment, and return its folder of programs."""
    venv.create(folder, with_pip=True)
    programs = folder / "bin"
    run(programs / "python", "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", wheel, cwd=folder)
    packages = run(programs / "python", "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip()
    # A path in a .pth file comes after the environment's own, and the .pth files there, an editable install's too, are
    # not read.
    Path(packages, "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
    return programs


def main() -> None:
    from pages import blocks

    wheel = build()
    with tempfile.TemporaryDirectory() as temporary:
        programs, elsewhere = install(wheel, Path(temporary, "env")), Path(temporary, "elsewhere")
        elsewhere.mkdir()
        started = time.perf_counter()
        if "unlearn" not in run(programs / "semu", "--help", cwd=elsewhere):
            sys.exit("`semu --help` does not name its verbs.")
        print(f"semu --help took {time.perf_counter() - started:.2f} s")
        run(programs / "semu", "methods", "--json", cwd=elsewhere)
        readme = elsewhere / "readme.py"
        code = "\n".join(block.code for block in blocks(ROOT / "README.md", "python"))
        where = "import semu_peft\nassert semu_peft.__file__.startswith(__import__('sys').prefix), semu_peft.__file__\n"
        readme.write_text(where + code, encoding="utf-8")
        # Of the tests, the README needs the tiny pipeline that stands for a loaded one.
        run(programs / "python", readme, cwd=elsewhere, PYTHONPATH=str(ROOT / "tests"), HF_HUB_OFFLINE="1")
    print(f"{wheel.name} builds, installs and runs.")


if __name__ == "__main__":
    main()
