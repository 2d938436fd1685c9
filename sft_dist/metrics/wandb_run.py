"""The run of W&B that belongs to a run directory: one id over all starts, and no start's metrics missing from it."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from sft_dist.config.schema import WandbConfig
from sft_dist.errors import ConfigError
from sft_dist.metrics.tracker import Lines, Table

# How often W&B's own process is started again in place of one that is gone.
MAX_RESTARTS = 3

# Until it has written, or sent, everything. A slow line to its server takes longer, but a job that was told to end
# has seconds.
OFFLINE_S, ONLINE_S = 20.0, 120.0

# Before it is started again: it names the folder of a start by the second.
PAUSE_S = 1.1

CORE = "wandb-core"


class WandbRun:
    """Takes metrics until it cannot any more.

    W&B keeps its metrics in a process of its own, which writes them late. A scheduler's SIGTERM to every process of a
    job ends that one at once, and a power cut takes what was not written. So where it is gone it is started again, and
    offline each start gets all metrics of the run from its beginning: the newest folder that W&B wrote is whole.
    Online, where W&B's server knows how far it is, it gets those that the server lacks. Tables and results are few,
    and are repeated.

    Args:
        folder: the run directory.
        settings: the resolved configuration, without secrets.

    Raises:
        ConfigError: it does not start.
    """

    name = "W&B"

    def __init__(self, config: WandbConfig, folder: Path, settings: dict[str, Any]) -> None:
        self.patience_s = ONLINE_S if config.mode == "online" else OFFLINE_S
        self._config, self._folder, self._settings = config, folder, settings
        self._restarts, self._is_given_up = 0, False
        self._tables: dict[str, Table] = {}
        self._concluded: tuple[dict[str, Any], Path] | None = None
        self._run = self._start()

    def log(self, metrics: Mapping[str, Any], *, lines: Lines) -> None:
        try:
            self._run.log(dict(metrics), step=int(metrics["step"]))
        except Exception:
            self._start_again(lines())

    def replay(self, lines: list[str]) -> None:
        try:
            self._hand_over(lines)
        except Exception:
            self._start_again(lines)

    def table(self, table: Table, *, lines: Lines) -> None:
        self._tables[table.name] = table
        self._surely(lambda: self._show(table), lines, is_remembered=True)

    def conclude(self, results: Mapping[str, Any], artefact: Path, *, lines: Lines) -> None:
        """The results in the run's summary, and a reference to the artefact, whose files stay where they are."""
        self._concluded = dict(results), artefact
        self._surely(lambda: self._conclude(dict(results), artefact), lines, is_remembered=True)

    def finish(self, *, code: int, is_preempted: bool, lines: Lines) -> None:
        self._surely(lambda: self._finish(code, is_preempted=is_preempted), lines)

    def give_up(self) -> None:
        """W&B would wait for its own process when Python ends."""
        self._is_given_up = True
        if self._core is not None:
            with suppress(psutil.Error):
                self._core.kill()
        import wandb

        # That of a process that is gone: what it raises, or, where it hears of the kill, an end of this program.
        with suppress(Exception, SystemExit):
            wandb.teardown()

    def _surely(self, act: Callable[[], Any], lines: Lines, *, is_remembered: bool = False) -> None:
        """Does something; where W&B's process is gone, once more with a new one.

        The first that is sent to a process that has just ended is lost without an error, so it is looked at, too.

        Args:
            is_remembered: a new one gets it with all that it is handed.
        """
        try:
            if self._core is not None and not _lives(self._core):
                raise ConnectionResetError("its process is gone")
            act()
        except Exception:
            self._start_again(lines())
            if not is_remembered:
                act()

    def _show(self, table: Table) -> None:
        import wandb

        shown = wandb.Table(columns=list(table.columns), data=[list(row) for row in table.rows()])
        # W&B takes nothing for a step behind its last one.
        self._run.log({table.name: shown}, step=max(table.step, self._run.step))

    def _conclude(self, results: dict[str, Any], artefact: Path) -> None:
        import wandb

        link = wandb.Artifact(f"{self._folder.resolve().name}-final", type="model", metadata=results)
        link.add_reference(artefact.resolve().as_uri(), checksum=False)
        self._run.summary.update(results)
        self._run.log_artifact(link)

    def _hand_over(self, lines: list[str]) -> None:
        known = self._run.step if self._config.mode == "online" else 0
        for line in lines:
            metrics = json.loads(line)
            names = metrics.pop("non_finite", [])
            if metrics["step"] >= known:
                self._run.log(metrics | dict.fromkeys(names, math.nan), step=int(metrics["step"]))

    def go_back(self, completed: int, lines: list[str]) -> None:
        """Offline it begins anew with the lines that are left. W&B's server takes no step twice: online the steps that
        are trained again keep their first numbers. Tables are given anew."""
        self._tables.clear()
        if self._config.mode == "offline":
            self._surely(lambda: self._run.finish(exit_code=0), lambda: lines)
            time.sleep(PAUSE_S)
            self._run = self._start()
            self.replay(lines)

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
        self._core = next((child for child in psutil.Process().children() if _is_core(child)), None)
        id_file.parent.mkdir(exist_ok=True)
        id_file.write_text(run.id)
        return run

    def _start_again(self, lines: list[str]) -> None:
        import wandb

        if self._restarts == MAX_RESTARTS or self._is_given_up:
            raise
        self._restarts += 1
        # That of a process that is gone: what it raises, or, where it hears of the kill, an end of this program.
        with suppress(Exception, SystemExit):
            wandb.teardown()
        time.sleep(PAUSE_S)
        self._run = self._start()
        self._hand_over(lines)
        for table in self._tables.values():
            self._show(table)
        if self._concluded is not None:
            self._conclude(*self._concluded)


def _is_core(process: psutil.Process) -> bool:
    try:
        return CORE in process.name() and _lives(process)
    except psutil.Error:
        return False


def _lives(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False
