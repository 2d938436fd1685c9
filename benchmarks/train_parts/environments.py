"""Other trainers, each in an environment of its own under .build/peers, made by pip when it is not there; or here."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import venv
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Peer:
    """
    Args:
        requirement: what pip installs.
        script: runs a task in the environment.
        without: packages that come with it, which no task needs and whose kernels may be those of another torch.
    """

    name: str
    requirement: str
    script: Path
    without: tuple[str, ...] = ()

    @property
    def python(self) -> Path:
        return ROOT / ".build" / "peers" / f"{self.name}-env" / "bin" / "python"

    def missing_here(self) -> str | None:
        """Why the Python that runs this cannot run it, or None."""
        return None if importlib.util.find_spec(self.name) else "the Python that runs this does not have it"

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
        for wanted in ([f"torch=={torch}"], [f"torch=={torch}", self.requirement, "peft", "bitsandbytes", "psutil"]):
            done = subprocess.run([*pip, *wanted], capture_output=True, text=True)
            if done.returncode:
                lines = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
                return lines[0] if lines else f"pip install {' '.join(wanted)} ended with {done.returncode}"
        if self.without:
            subprocess.run([str(self.python), "-m", "pip", "uninstall", "--quiet", "--yes", *self.without], check=True)
        mark.touch()
        return None


PEERS = {
    "trl": Peer("trl", "trl==1.16.0", Path(__file__).with_name("peer_trl.py")),
    "llamafactory": Peer(
        "llamafactory",
        "llamafactory==0.9.5",
        Path(__file__).with_name("peer_llamafactory.py"),
        without=("torchvision", "torchaudio"),
    ),
    "axolotl": Peer("axolotl", "axolotl==0.19.0", Path(__file__).with_name("peer_axolotl.py")),
}
