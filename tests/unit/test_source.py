"""What the PATH of export, and that of chat and serve, stands for, and what is said about a wrong one."""

from __future__ import annotations

from pathlib import Path

import pytest

from sft_dist.checkpoint.source import find_newest_source, find_source
from sft_dist.errors import ConfigError
from tests.helpers.checkpoints import make_checkpoint

SETTINGS = """\
model: {path: m}
data: {train: [{path: a.jsonl}]}
train: {global_batch_size: 2, max_steps: 3}
output_dir: runs/x
"""


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run with two checkpoints and no final/ yet."""
    folder = tmp_path / "support"
    for step in (10, 20):
        (make_checkpoint(folder, step) / "config.yaml").write_text(SETTINGS)
    (folder / "config.yaml").write_text(SETTINGS)
    return folder


def finish(run: Path, file: str = "adapter_config.json") -> Path:
    (run / "final").mkdir()
    (run / "final" / file).write_text("{}")
    return run / "final"


def test_a_finished_run_is_its_final(run: Path) -> None:
    final = finish(run)
    for path in (run, final):
        source = find_newest_source(str(path))
        assert find_source(path) == source
        assert (source.name, source.folder, source.kind, source.notice) == ("support", final, "adapter", None)
        assert source.config is not None


def test_a_run_without_final_is_its_newest_checkpoint_and_says_so(run: Path) -> None:
    source = find_newest_source(str(run))
    assert (source.folder.name, source.kind) == ("step-00000020", "checkpoint")
    assert source.notice == f"{run} has no final/ yet: its newest checkpoint answers, step-00000020"


def test_an_export_says_which_checkpoint_it_is_of(run: Path) -> None:
    with pytest.raises(ConfigError, match="has no final/: the run is not finished") as caught:
        find_source(run)
    assert caught.value.fix == "say --checkpoint latest"
    source = find_source(run, checkpoint="latest")
    assert (source.label, source.run_directory) == ("-step-00000020", run)
    finish(run)
    assert find_source(run).label == ""
    with pytest.raises(ConfigError, match="is no folder here"):
        find_source(run / "nothing")


def test_a_checkpoint_that_was_copied_is_one(run: Path, tmp_path: Path) -> None:
    copied = (run / "checkpoints" / "step-00000010").rename(tmp_path / "taken")
    source = find_source(copied)
    assert (source.kind, source.name, source.run_directory) == ("checkpoint", "taken", None)
    assert find_newest_source(str(copied)) == source


def test_a_checkpoint_by_its_step_or_its_folder(run: Path) -> None:
    finish(run)
    by_step, latest = (find_newest_source(str(run), checkpoint=wanted) for wanted in ("10", "latest"))
    by_folder = find_newest_source(str(run / "checkpoints" / "step-00000010"))
    assert by_step == by_folder
    assert (by_step.name, by_step.notice) == ("support-step-00000010", None)
    assert latest.folder.name == "step-00000020"


def test_an_artefact_that_was_copied_has_no_run(run: Path, tmp_path: Path) -> None:
    copied = finish(run, "config.json").rename(tmp_path / "copied")
    source = find_newest_source(str(copied))
    assert (source.name, source.config) == ("copied", None)


@pytest.mark.parametrize(
    ("path", "checkpoint", "what", "fix"),
    [
        ("support", "15", "support has no complete checkpoint of step 15", "there are 10, 20"),
        ("support", "last", "--checkpoint last is no number of steps", "give a number, or latest"),
        ("support/checkpoints/step-00000010", "10", "--checkpoint chooses one of a run directory", "give the output_dir of the run"),
        ("empty", None, "empty is neither a run directory, nor a checkpoint, nor a model", "give the output_dir of a run"),
        ("begun", None, "begun has neither final/ nor a complete checkpoint", "let the run write one"),
        ("begun", "latest", "begun has no complete checkpoint", "let the run write one"),
        ("nobody/nothing", None, "nobody/nothing is neither a folder nor a model in the local hub cache", "sft-dist model fetch"),
        ("./nothing", None, "nothing is neither a folder nor a model in the local hub cache", "give the output_dir"),
    ],
)  # fmt: skip
def test_what_is_not_there(
    run: Path, monkeypatch: pytest.MonkeyPatch, path: str, checkpoint: str | None, what: str, fix: str
) -> None:
    monkeypatch.chdir(run.parent)
    Path("empty").mkdir()
    Path("begun/checkpoints/step-00000010.unfinished").mkdir(parents=True)
    Path("begun/config.yaml").write_text(SETTINGS)
    with pytest.raises(ConfigError) as caught:
        find_newest_source(path, checkpoint=checkpoint)
    assert what in caught.value.what
    assert fix in caught.value.fix


@pytest.mark.parametrize("suffix", ["rejected", "damaged", "unfinished"])
def test_what_nothing_is_resumed_from_is_not_used_either(run: Path, suffix: str) -> None:
    checkpoint = run / "checkpoints/step-00000020"
    kept = checkpoint.rename(checkpoint.with_name(f"{checkpoint.name}.{suffix}"))
    with pytest.raises(ConfigError, match=rf"is no checkpoint to use: {suffix} is what became of it"):
        find_source(kept)
