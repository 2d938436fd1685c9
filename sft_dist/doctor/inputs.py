"""What training reads from elsewhere: is the model here, are the files of the data."""

from __future__ import annotations

import os
from collections.abc import Mapping

from sft_dist.config.schema import Config
from sft_dist.data.sources import check_source
from sft_dist.doctor.finding import Finding, Level
from sft_dist.errors import SftError


def check_inputs(node: str, config: Config, env: Mapping[str, str] = os.environ) -> list[Finding]:
    """The model in a folder or in the hub's cache, and each source of the data.

    A fault is a failure where training comes next and would refuse at once. It is a warning where `prepare` comes
    first, which brings a model here: on a login node, where the configuration has a section ``cluster``. In a job it
    is one too: there training itself ends with the exit code of the mistake, after which no job starts again.
    """
    level: Level = "warning" if "cluster" in config.model_fields_set or "SLURM_JOB_ID" in env else "failed"
    return [_model(node, config, level), _data(node, config, level)]


def _model(node: str, config: Config, level: Level) -> Finding:
    from sft_dist.model.hub import Part, model_folder  # the hub's library takes a second to import

    parts: tuple[Part, ...] = ("config", "tokenizer", "weights")
    path, revision = config.model.path, config.model.revision
    try:
        folder = [model_folder(path, revision, part) for part in parts][-1]
    except SftError as error:
        return Finding("model", node, level, error.what.removeprefix("model.path: "), error.fix, is_shared=True)
    return Finding("model", node, "ok", f"{path} is in {folder}")


def _data(node: str, config: Config, level: Level) -> Finding:
    faults: list[SftError] = []
    sources = (*config.data.train, *config.data.eval)
    for source in sources:
        try:
            check_source(source)
        except SftError as error:
            faults.append(error)
    if faults:
        more = f" (and {len(faults) - 1} more of {len(sources)} sources)" if len(faults) > 1 else ""
        return Finding("data", node, level, f"{faults[0].what}{more}", faults[0].fix, is_shared=True)
    return Finding("data", node, "ok", f"{len(sources)} source{'s' if len(sources) > 1 else ''} of the data found")
