"""Setup for Colab_Train.ipynb: installs missing packages and mounts Google Drive."""

import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent


def missing(requirements: Path = ROOT / "requirements.txt") -> list[str]:
    """The requirements that this machine does not meet, except PyTorch: Colab's build matches its GPU."""
    wanted = [line.partition("#")[0].strip() for line in requirements.read_text().splitlines()]
    return [line for line in wanted if line and not is_met(Requirement(line))]


def is_met(requirement: Requirement) -> bool:
    if requirement.name == "torch":
        return True
    try:
        return requirement.specifier.contains(version(requirement.name), prereleases=True)
    except PackageNotFoundError:
        return False


def install_missing() -> None:
    if packages := missing():
        subprocess.run([sys.executable, "-m", "pip", "install", "-q", *packages], check=True)
    print(f"installed {', '.join(packages)}" if packages else "all packages are already installed")


def mount_drive(folder: str = "/content/drive") -> Path:
    """Mounts Google Drive at `folder` and returns its top folder, MyDrive. Raises RuntimeError if that fails."""
    from google.colab import drive  # exists only on Colab

    drive.mount(folder)
    top = Path(folder) / "MyDrive"
    if not top.is_dir():
        raise RuntimeError(f"no {top}: the Drive is not mounted; run this cell again and allow access")
    return top
