"""A folder that behaves like a mounted Drive: it answers late, and what is deleted or replaced goes to its trash."""

import builtins
import os
import time
from pathlib import Path


class SimulatedDrive:
    """Watches a folder from `mount` on.

    trash: bytes of files that were deleted or replaced without being emptied.
    written: size of each file that got its final name, by that name.
    """

    def __init__(self, top: Path, delay: float = 0.0):
        self.top, self.delay = top.resolve(), delay
        self.trash = 0
        self.written: list[tuple[str, int]] = []

    def mount(self, patch=setattr) -> "SimulatedDrive":
        """Replaces functions of this process; give `monkeypatch.setattr` to undo it."""
        unlink, replace, open_file = os.unlink, os.replace, builtins.open

        def late_unlink(path, **options):
            if self.holds(path):
                self.trash += os.path.getsize(path)
            unlink(path, **options)

        def late_replace(source, target):
            if self.holds(target):
                self.trash += os.path.getsize(target) if os.path.exists(target) else 0
                if not str(target).endswith(".tmp"):
                    self.written.append((os.path.basename(target), os.path.getsize(source)))
            replace(source, target)

        def late_open(path, *arguments, **options):
            if isinstance(path, str | os.PathLike):
                self.holds(path)
            return open_file(path, *arguments, **options)

        patch(os, "unlink", late_unlink)
        patch(os, "replace", late_replace)
        patch(builtins, "open", late_open)
        return self

    def holds(self, path) -> bool:
        """Whether the path is on the Drive; waits if so."""
        is_here = Path(os.path.abspath(path)).is_relative_to(self.top)
        if is_here:
            time.sleep(self.delay)
        return is_here
