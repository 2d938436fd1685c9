"""A run whose disk is lost goes on from its copies as if nothing had happened."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import fsspec
import pytest

from sft_dist.checkpoint.mirror import Mirror
from sft_dist.checkpoint.store import complete_checkpoints, name_of
from tests.e2e.test_kill import PATIENCE_S, steps_of, wait_for, write_config
from tests.helpers.object_store import VARIABLES, s3_server
from tests.helpers.ranks import Ranks

LENGTH = ["train.max_steps=16", "checkpoint.every_steps=4"]


def started(config: Path, output: Path, log: Path, *arguments: str) -> Ranks:
    environment = {name: os.environ[name] for name in VARIABLES if name in os.environ}
    command = ["train", str(config), f"output_dir={output}", *LENGTH, *arguments]
    return Ranks(2, command, log, environment=environment)


def trained(config: Path, output: Path, *arguments: str) -> str:
    """Runs to the end; what was said."""
    log = output.with_name("end.log")
    with started(config, output, log, *arguments) as ranks:
        assert ranks.exit_codes(PATIENCE_S) == [0, 0], log.read_text()
    return log.read_text()


def metrics(output: Path) -> dict[int, tuple[float, float]]:
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: (line["loss"], line["grad_norm"]) for line in lines if "loss" in line}


@pytest.mark.ci
def test_the_run_directory_is_lost_twice_and_a_checkpoint_damaged(tiny_base: Path, tmp_path: Path) -> None:
    config, whole, output = write_config(tiny_base, tmp_path, "fsdp2", "lora"), tmp_path / "whole", tmp_path / "run"
    trained(config, whole)
    with s3_server() as bucket:
        url = f"{bucket}/runs/x"
        arguments = [f"checkpoint.mirror={url}", "--resume", "auto"]
        with started(config, output, tmp_path / "killed.log", *arguments) as ranks:
            wait_for(lambda: any(step > 8 for step in steps_of(output)), ranks)
            wait_for(lambda: any(step >= 8 for step in Mirror(url).complete()), ranks)
            ranks.kill()
        newest = Mirror(url).complete()[-1]
        assert newest >= 8, "there is something to go on from"

        shutil.rmtree(output)
        said = trained(config, output, *arguments)
        assert f"fetching  {url}/{name_of(newest)}, " in said
        assert f"resumed   {output}/checkpoints/{name_of(newest)}: {newest} steps and " in said
        assert metrics(output) == {step: at for step, at in metrics(whole).items() if step > newest}
        for path in (whole / "final").glob("*.safetensors"):
            assert (output / "final" / path.name).read_bytes() == path.read_bytes()
        kept = complete_checkpoints(output / "checkpoints")
        assert Mirror(url).complete() == [int(path.name.removeprefix("step-")) for path in kept], "rotated like here"
        assert all(Mirror(url).is_copy_of(path) for path in kept)

        # The end is damaged here, but not there.
        (last,) = complete_checkpoints(output / "checkpoints")[-1:]
        shard = next(last.glob("*.safetensors"))
        content = bytearray(shard.read_bytes())
        content[-1] ^= 1
        shard.write_bytes(content)
        shutil.rmtree(output / "final")
        said = trained(config, output, *arguments)
        assert f"{last} is damaged, it is kept as {last.name}.damaged; fetching its copy" in said
        assert f"resumed   {last}: 16 steps and " in said
        assert metrics(output) == {step: at for step, at in metrics(whole).items() if step > newest}

        # By its URL, in another place, where the copies of that run stay as they are.
        copies = sorted(fsspec.filesystem("s3", skip_instance_cache=True).find(url))
        other = tmp_path / "other"
        said = trained(config, other, "--resume", f"{url}/{last.name}")
        assert f"resumed   {other}/checkpoints/{last.name}" in said
        assert sorted(fsspec.filesystem("s3", skip_instance_cache=True).find(url)) == copies
