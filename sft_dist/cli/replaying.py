"""``sft-dist replay``. Imports no torch at module level."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from sft_dist.cli.options import Overrides
from sft_dist.errors import CheckpointError, ConfigError

DEFAULT_TOLERANCE = 1e-5


def replay(
    receipt: Annotated[Path, typer.Argument(metavar="RECEIPT", help="A run's receipt.json, or its output_dir.")],
    overrides: Overrides = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", metavar="FOLDER", help="The new output_dir; RUN-replay by default.")
    ] = None,
    check: Annotated[
        bool, typer.Option("--check", help="Train nothing: say what is not as it was, and end with its exit code.")
    ] = False,
    anyway: Annotated[
        bool, typer.Option("--anyway", help="Go on although data, template or model are not what they were.")
    ] = False,
    tolerance: Annotated[
        float,
        typer.Option("--tolerance", metavar="X", min=0.0, help="Relative difference up to which it is the same run."),
    ] = DEFAULT_TOLERANCE,
) -> None:
    """Repeat a run from its receipt into a new folder, and say whether it came out the same.

    Under any launcher, as train. What differs from then is told first, what changes the numbers ends it. Nothing is
    tracked unless logging says so here. Ends with 5 where the outcome differs; replay.json has what was compared.
    """
    from sft_dist.replay.here import Found, differences, find_differences, is_by_user, override_keys, refusal
    from sft_dist.replay.outcome import Outcome, compare_series, compare_weights, series_of
    from sft_dist.replay.receipt import config_of_replay, read_recorded
    from sft_dist.runtime.world import restarts
    from sft_dist.train.preflight import check_holds_no_run, check_inputs

    recorded, given = read_recorded(receipt), overrides or []
    run = recorded.folder.resolve()
    folder = out or run.with_name(f"{run.name}-replay")
    config = config_of_replay(recorded, given, folder)
    then = series_of(recorded.folder)
    if not check and not then and recorded.content.get("weights") is None:
        raise ConfigError(
            f"{recorded.folder} has neither a recorded step nor a digest of final weights: nothing can be compared",
            fix="repeat a run that has trained, with its metrics.jsonl beside the receipt; or `sft-dist train`",
        )
    if not check and not restarts():
        check_holds_no_run(Path(config.output_dir))
    found, is_main = Found(), os.environ.get("RANK", "0") == "0"

    def compare() -> None:
        nonlocal found
        began_in = recorded.content.get("directory")
        if began_in not in (None, str(Path.cwd())):
            typer.echo(f"the run was started in {began_in}; relative paths count from {Path.cwd()} now")
        check_inputs(config)
        found = find_differences(recorded, config, given)
        for line in found.lines():
            typer.echo(line)
        if found.numbers and not anyway:
            raise refusal(found.numbers, recorded)

    # Where there are others they wait for it, and end as this one does.
    is_alone = os.environ.get("WORLD_SIZE", "1") == "1"
    if is_main and (check or is_alone):
        compare()
    if check:
        return
    from sft_dist.cli.training import run_checked
    from sft_dist.train.asked import Asked

    def must_be_the_same(who: Mapping[str, Any]) -> None:
        keys = override_keys(given)
        other = [each for each in differences(recorded.content["identity"], who) if not is_by_user(each.name, keys)]
        if other and not anyway:
            raise refusal(other, recorded)

    before = (lambda: None) if is_alone else compare
    run_checked(config, Asked(before=before, on_identity=must_be_the_same))
    if not is_main:
        return
    from sft_dist.export.provenance import read_receipt
    from sft_dist.replay.verdict import lines_of, verdict, write_replay

    new, now = Path(config.output_dir), read_receipt(Path(config.output_dir))
    outcome = Outcome(
        compare_series(then, series_of(new)),
        compare_weights(recorded.content, now, (recorded.folder, new)),
    )
    parts = ("identity", "versions", "topology", "machine", "environment")
    after = [each for part in parts for each in differences(recorded.content[part], now.get(part) or {})]
    for line in lines_of(recorded, outcome, found, after, tolerance):
        typer.echo(line)
    write_replay(new, recorded, given, found, after, outcome, tolerance)
    if not outcome.is_within(tolerance):
        raise CheckpointError(
            f"{new} did not come out as {recorded.folder} did: {verdict(outcome, tolerance)}",
            fix=f"see what differs above and in {new / 'replay.json'}; --tolerance says what counts as the same",
        )
