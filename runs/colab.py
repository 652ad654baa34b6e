"""What the notebooks do on Colab: get the project, install the packages that Colab lacks, follow a form."""

import importlib
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, packages_distributions, version
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent
GITHUB = "OWNER/REPOSITORY"  # where the project is published; CONTRIBUTING.md says how to fill it in

# The same cell in all notebooks. One that was opened from GitHub has no files beside it, so it holds the address.
FIRST_CELL = f"""import os
import subprocess

REPOSITORY = os.environ.get("REPOSITORY", "https://github.com/{GITHUB}")
if not os.path.exists("runs/colab.py"):  # the project is not beside this notebook, as on Colab
    if not os.path.exists("transformer"):
        assert "OWNER" not in REPOSITORY, "no address of the project: fill in REPOSITORY"
        subprocess.run(["git", "clone", "-q", REPOSITORY, "transformer"], check=True)
    os.chdir("transformer")
    from runs import colab

    colab.install_missing()"""


def badge(notebook: str) -> str:
    """A link, in Markdown, that opens a notebook of the repository on Colab."""
    site = "https://colab.research.google.com"
    return f"[![Open in Colab]({site}/assets/colab-badge.svg)]({site}/github/{GITHUB}/blob/main/{notebook})"


# ---------------------------------------------------------------------------- packages


def install_missing() -> None:
    """Installs the packages that are missing. Raises RuntimeError if that fails or if the kernel must be restarted."""
    packages = missing(ROOT / "requirements.txt")
    if not packages:
        print("all packages are already installed")
        return
    before = imported_versions()
    done = subprocess.run([sys.executable, "-m", "pip", "install", "-q", *packages])
    if done.returncode:
        raise RuntimeError(f"pip cannot install {', '.join(packages)}; restart the session and run all cells again")
    print(f"installed {', '.join(packages)}")
    importlib.invalidate_caches()
    replaced = [f"{name} {old}" for name, old in before.items() if version(name) != old]
    if replaced:
        raise RuntimeError(f"restart the session and run all cells again: it has imported {', '.join(replaced)}")


def missing(requirements: Path) -> list[str]:
    """The lines of a requirements file, and of those that it includes with -r, that this machine does not meet.

    Except PyTorch: Colab's build matches its GPU.
    """
    found = []
    for line in requirements.read_text(encoding="utf8").splitlines():
        line = line.partition("#")[0].strip()
        if line.startswith("-r "):
            found += missing(requirements.parent / line.removeprefix("-r "))
        elif line and not is_met(Requirement(line)):
            found.append(line)
    return found


def is_met(requirement: Requirement) -> bool:
    if requirement.name == "torch":
        return True
    try:
        return requirement.specifier.contains(version(requirement.name), prereleases=True)
    except PackageNotFoundError:
        return False


def imported_versions() -> dict[str, str]:
    """The installed packages from which this process has imported, with their versions."""
    packages = packages_distributions()
    modules = {name.partition(".")[0] for name in sys.modules}
    return {package: version(package) for module in modules for package in packages.get(module, ())}


# ---------------------------------------------------------------------------- the form of Colab_Train.ipynb


def configure(preset: str, copies: Path, **form):
    """The config of a preset, changed where the form is not empty or 0, with a copy of the run in `copies`."""
    from config import get_config  # not above: its packages may have to be installed first

    changed = {name: value for name, value in form.items() if value}
    config = get_config(preset, **changed)
    name = f"{preset}.{config.lang_src}-{config.lang_tgt}"
    return get_config(preset, **changed, run_dir=f"weights/{name}", mirror_dir=str(copies / name))
