"""Other trainers, installed into folders of their own without dependencies: the environment stays as it is."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TRL_VERSION = "1.16.0"


def install_trl() -> Path:
    """The folder to put on the import path for TRL; filled by pip when it is not there."""
    folder = ROOT / ".build" / "peers" / "trl"
    if not (folder / f"trl-{TRL_VERSION}.dist-info").exists():
        print(f"installing trl {TRL_VERSION} into {folder}", file=sys.stderr)
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--upgrade", "--target", str(folder)]
        subprocess.run([*command, f"trl=={TRL_VERSION}"], check=True)
    return folder
