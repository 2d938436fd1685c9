"""The run of W&B that belongs to a run directory: one id over all starts, and no start's metrics missing from it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from sft_dist.config.schema import WandbConfig
from sft_dist.errors import ConfigError

# How often W&B's own process is started again in place of one that is gone.
MAX_RESTARTS = 3


class WandbRun:
    """Takes metrics until it cannot any more.

    W&B keeps its metrics in a process of its own, which writes them late. A scheduler's SIGTERM to every process of a
    job ends that one at once, and a power cut takes what was not written. So where it is gone it is started again, and
    offline each start gets all metrics of the run from its beginning: the newest folder that W&B wrote is whole.
    Online, where W&B's server knows how far it is, it gets those that the server lacks.

    Args:
        folder: the run directory.
        settings: the resolved configuration.

    Raises:
        ConfigError: it does not start.
    """

    def __init__(self, config: WandbConfig, folder: Path, settings: dict[str, Any]) -> None:
        self._config, self._folder, self._settings = config, folder, settings
        self._restarts = 0
        self._run = self._start()

    def log(self, metrics: dict[str, Any], *, lines: Callable[[], list[str]]) -> None:
        """Hands over the metrics of a step.

        Args:
            lines: all lines of the run so far, those of this step among them; asked for where W&B has to begin again.

        Raises:
            Exception: of W&B's, which takes nothing more.
        """
        try:
            self._run.log(metrics, step=int(metrics["step"]))
        except Exception:
            self._start_again(lines())

    def replay(self, lines: list[str]) -> None:
        """Hands over what earlier starts of the run have measured; raises as ``log``."""
        known = self._run.step if self._config.mode == "online" else 0
        for line in lines:
            metrics = json.loads(line)
            names = metrics.pop("non_finite", [])
            if metrics["step"] >= known:
                self._run.log(metrics | dict.fromkeys(names, math.nan), step=int(metrics["step"]))

    def go_back(self, lines: list[str]) -> None:
        """The run trains steps again; raises as ``log``.

        Offline it begins anew with the lines that are left. W&B's server takes no step twice: online the steps that are
        trained again are those of before, until the run is past them.
        """
        if self._config.mode == "offline":
            self._run.finish()
            self._run = self._start()
            self.replay(lines)

    def finish(self, *, code: int, is_preempted: bool, lines: Callable[[], list[str]]) -> None:
        """Tells W&B how the run ended, and waits until it has written everything; raises as ``log``."""
        try:
            self._finish(code, is_preempted=is_preempted)
        except Exception:
            self._start_again(lines())
            self._finish(code, is_preempted=is_preempted)

    def _finish(self, code: int, *, is_preempted: bool) -> None:
        if is_preempted:
            self._run.mark_preempting()
        self._run.finish(exit_code=code)

    def _start(self) -> Any:
        import wandb

        mode, id_file = self._config.mode, self._folder / "wandb" / "run_id"
        known = id_file.read_text() if id_file.exists() else None
        try:
            run = wandb.init(
                project=self._config.project, name=self._config.name, mode=mode, dir=self._folder,
                config=self._settings, id=known, resume="allow" if known is not None and mode == "online" else None,
                settings=wandb.Settings(silent=True, console="off"),
            )  # fmt: skip
        except Exception as e:
            raise ConfigError(
                f"logging.wandb.mode={mode}: W&B did not start ({str(e).strip().splitlines()[0]})",
                fix="run `wandb login`, or set logging.wandb.mode to offline or disabled",
            ) from e
        id_file.parent.mkdir(exist_ok=True)
        id_file.write_text(run.id)
        return run

    def _start_again(self, lines: list[str]) -> None:
        import wandb

        if self._restarts == MAX_RESTARTS:
            raise
        self._restarts += 1
        with suppress(Exception):  # that of a process that is gone
            wandb.teardown()
        self._run = self._start()
        self.replay(lines)
