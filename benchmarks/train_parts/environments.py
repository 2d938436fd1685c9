"""Other trainers, each in an environment of its own under .build/peers; made by pip when it is not there."""

from __future__ import annotations

import subprocess
import sys
import venv
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Peer:
    """Args: requirement: what pip installs; script: that runs a task in the environment."""

    name: str
    requirement: str
    script: Path

    @property
    def python(self) -> Path:
        return ROOT / ".build" / "peers" / f"{self.name}-env" / "bin" / "python"

    def install(self) -> str | None:
        """Makes the environment; why that is not possible, or None."""
        mark = self.python.parents[1] / f"{self.requirement}.installed"
        if mark.exists():
            return None
        print(f"installing {self.requirement} into {self.python.parents[1]}", file=sys.stderr)
        venv.create(self.python.parents[1], with_pip=True, clear=True)
        # The torch that is here: both sides have the same kernels.
        torch = version("torch").partition("+")[0]
        pip = [str(self.python), "-m", "pip", "install", "--quiet"]
        for wanted in ([f"torch=={torch}"], [self.requirement, "peft", "bitsandbytes", "psutil"]):
            done = subprocess.run([*pip, *wanted], capture_output=True, text=True)
            if done.returncode:
                lines = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
                return lines[0] if lines else f"pip install {' '.join(wanted)} ended with {done.returncode}"
        mark.touch()
        return None


PEERS = {
    "trl": Peer("trl", "trl==1.16.0", Path(__file__).with_name("peer_trl.py")),
}
