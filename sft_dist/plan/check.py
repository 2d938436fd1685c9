"""Whether a configuration can be trained, found out without GPU, weights, data and network."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from sft_dist.config.data_schema import SourceConfig
from sft_dist.config.describe import join_or
from sft_dist.config.measured import files_of_evaluations
from sft_dist.config.schema import (
    RECOMPUTATION,
    AutoSharding,
    ConcreteSharding,
    Config,
    DdpSharding,
    Fsdp2Sharding,
    LoraMethod,
    QloraMethod,
)
from sft_dist.config.validate import validate
from sft_dist.data.files import is_url
from sft_dist.data.named_templates import form_of
from sft_dist.data.sources import files_here
from sft_dist.errors import ConfigError, SftError
from sft_dist.model.hub import ModelNotHere, can_be_id, config_source
from sft_dist.model.known import ModelNotKnown, known_models_allowed
from sft_dist.resolve import Describe, described_once, resolve
from sft_dist.run import Run
from sft_dist.runtime.world import WorldShape

BRING = "sft-dist model fetch CONFIG --no-weights"


@dataclass(frozen=True)
class Checked:
    """What became of a configuration.

    Args:
        runs: what it resolves to; several where ``auto`` is decided by a device's memory, none without a model.
        notes: what could not be checked or would be refused, one line each.
    """

    runs: list[Run]
    notes: list[str]


def check(config: Config, shape: WorldShape, *, describe: Describe | None = None) -> Checked:
    """Resolves a configuration in every way that ``auto`` may go where the memory of a device is unknown.

    A known model need not be on this machine.

    Args:
        describe: as for ``resolve``.

    Raises:
        ConfigError: its keys contradict each other, the model is not supported, or no way that ``auto`` may go can be
            trained.
    """
    validate(config)
    with known_models_allowed():
        return _check(config, shape, describe)


def _check(config: Config, shape: WorldShape, describe: Describe | None) -> Checked:
    described = described_once(describe)
    runs: list[Run] = []
    refused: list[tuple[Config, ConfigError]] = []
    for concrete in _without_auto(config):
        try:
            validate(concrete)
            runs.append(resolve(concrete, shape, describe=described))
        except (ModelNotHere, ModelNotKnown) as e:
            why = f"{e.what}: neither the model nor what goes together with it was checked; {_remedy(config, e)}"
            return Checked([], [f"not checked: {why}", *_not_here(config), *_not_run(config)])
        except ConfigError as e:
            refused.append((concrete, e))
    if not runs:
        raise refused[0][1]
    possible = {run.strategy for run in runs}  # there another mode is taken
    notes = [
        f"auto {'will' if other.sharding.strategy in possible else 'must'} not become {_ways(other)}: {e.what}"
        for other, e in refused
    ]
    return Checked(runs, [*notes, *_from_the_table(config), *_not_here(config), *_not_run(config)])


def _remedy(config: Config, missing: SftError) -> str:
    if not can_be_id(config.model.path):
        return missing.fix
    bring = BRING if needs_no_weights(config) else BRING.removesuffix(" --no-weights")
    return f"bring it here by: {bring}"


def _from_the_table(config: Config) -> list[str]:
    source = config_source(config.model.path, config.model.revision)
    return [] if source is None else [f"not checked: the model's own config.json is not here; in its place: {source}"]


def _not_here(config: Config) -> list[str]:
    adapter = config.method.init_from if isinstance(config.method, LoraMethod) else None
    template = config.data.chat_template
    is_file = template is not None and form_of(template) == "file"
    files = {"method.init_from": adapter, "data.chat_template": template if is_file else None}
    files |= dict(files_of_evaluations(config.eval))
    missing = [(key, file) for key, file in files.items() if file and not Path(file).exists()]
    texts = config.eval.long_texts
    for number, path in enumerate([] if texts is None else texts.paths):
        if not is_url(path) and files_here(SourceConfig(path=path, format="text")) is None:
            missing.append((f"eval.long_texts.paths.{number}", path))
    return [f"not checked: {key} {file} is not here" for key, file in missing]


def _not_run(config: Config) -> list[str]:
    """The function that judges answers, whose file is there."""
    custom = None if config.eval.scores is None else config.eval.scores.custom
    if custom is None or not Path(custom.rpartition(":")[0]).exists():
        return []
    return [f"not checked: eval.scores.custom {custom} is loaded when training starts, which runs the file"]


def needs_no_weights(config: Config) -> bool:
    """Whether the model's ``config.json`` and tokenizer say all that describes the run."""
    return not (isinstance(config.method, QloraMethod) and config.method.quantization.skip == "auto")


def _without_auto(config: Config) -> list[Config]:
    shardings: list[ConcreteSharding] = (
        [DdpSharding(strategy="ddp"), Fsdp2Sharding()]
        if isinstance(config.sharding, AutoSharding)
        else [config.sharding]
    )
    given = config.activation_checkpointing
    modes = [given.model_copy(update={"mode": mode}) for mode in RECOMPUTATION] if given.mode == "auto" else [given]
    # What auto may become beside 1 is left out where it is refused.
    train = config.train
    if train.micro_batch_size == "auto":
        train = train.model_copy(update={"micro_batch_size": 1})
    return [
        config.model_copy(update={"sharding": sharding, "activation_checkpointing": mode, "train": train})
        for sharding in shardings
        for mode in modes
    ]


def _ways(config: Config) -> str:
    return f"{config.sharding.strategy} with activation_checkpointing.mode {config.activation_checkpointing.mode}"


def report(checked: Checked, shape: WorldShape) -> list[str]:
    """What was found, in lines for a person."""
    lines = []
    if checked.runs:
        run = checked.runs[0]
        strategies = " or ".join(dict.fromkeys(r.strategy for r in checked.runs))
        modes = join_or(list(dict.fromkeys(r.activation_checkpointing.mode for r in checked.runs)))
        processes = "1 process" if shape.size == 1 else f"{shape.size} processes"
        lines += [
            f"checked: every key; {run.model.path}: {run.model.num_parameters:,} parameters, "
            f"{run.model.num_trainable:,} of them trained",
            f"checked: {run.model.method.type} with {run.optim.type} on {processes} under {strategies} with activation "
            f"checkpointing {modes}",
        ]
    return [*lines, *checked.notes, "not checked: data, chat template, weights, the memory of the devices"]
