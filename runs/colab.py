"""What Colab_Train.ipynb needs of Colab: packages that are missing there, and the person's Drive."""

import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent


def missing(requirements: Path = ROOT / "requirements.txt") -> list[str]:
    """The requirements that this machine does not meet. PyTorch is never among them: Colab's fits its GPU."""
    wanted = [line.partition("#")[0].strip() for line in requirements.read_text().splitlines()]
    return [line for line in wanted if line and not met(Requirement(line))]


def met(requirement: Requirement) -> bool:
    if requirement.name == "torch":
        return True
    try:
        return requirement.specifier.contains(version(requirement.name), prereleases=True)
    except PackageNotFoundError:
        return False


def install_missing() -> None:
    if packages := missing():
        subprocess.run([sys.executable, "-m", "pip", "install", "-q", *packages], check=True)
    print(f"installed {', '.join(packages)}" if packages else "nothing was missing")


def mount_drive(folder: str = "/content/drive") -> Path:
    """Mounts the person's Drive and returns its top folder; raises RuntimeError where it is not there after that."""
    from google.colab import drive  # only Colab has it

    drive.mount(folder)
    top = Path(folder) / "MyDrive"
    if not top.is_dir():
        raise RuntimeError(f"no {top}: the Drive is not mounted; run this cell again and allow the access")
    return top
