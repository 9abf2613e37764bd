"""Build the package, check it, install it into an environment of its own, and use it from outside the repository.

Its dependencies are those of the environment that runs this: the new one sees them on its path, and nothing is
downloaded but what builds the package.
"""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import time
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DIST = ROOT / "dist"
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
    return wheel


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
