"""``--sweep``: how it is read, what its points are called and where their files go."""

from __future__ import annotations

from pathlib import Path

import pytest

from sft_dist.cluster.sweep import Sweep, Value, parse_axes, plan_sweep, short_keys, value_name
from sft_dist.cluster.sweep_files import expand_indices, read_sweeps, write_sweep
from sft_dist.config.load import load_config
from sft_dist.errors import ConfigError

CONFIG = """\
model: {path: m}
method: {type: lora, r: 4}
data: {train: [{path: a.jsonl}, {path: b.jsonl}]}
train: {global_batch_size: 2, max_steps: 3}
output_dir: runs/x
"""


@pytest.fixture
def sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> object:
    monkeypatch.chdir(tmp_path)
    Path("run.yaml").write_text(CONFIG)

    def planned(*texts: str, overrides: tuple[str, ...] = ()) -> Sweep:
        return plan_sweep(Path("run.yaml"), overrides, texts)

    return planned


def test_values_are_yaml_and_split_where_yaml_splits() -> None:
    (axis,) = parse_axes(["a.b=1e-5, [q_proj, v_proj],all-linear,'x, y',{c: [1, 2]},null"])
    assert axis.key == "a.b"
    assert [value.text for value in axis.values] == [
        "1e-5", "[q_proj, v_proj]", "all-linear", "'x, y'", "{c: [1, 2]}", "null",
    ]  # fmt: skip
    assert [value.value for value in axis.values] == [
        1e-5, ["q_proj", "v_proj"], "all-linear", "x, y", {"c": [1, 2]}, None,
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("optim.lr", "is not of the form KEY.PATH=V1,V2"),
        ("=1,2", "is not of the form KEY.PATH=V1,V2"),
        ("optim..lr=1,2", "is not of the form KEY.PATH=V1,V2"),
        ("optim.lr=", "has no values"),
        ("optim.lr=1,,2", "the values are not YAML"),
        ("optim.lr=[1,2", "the values are not YAML"),
        ("optim.lr=1] #", "the values are no list"),
        ("optim.lr=1e-5,0.00001", "has the value 0.00001 twice"),
        ("hardware.nodes=1,2", "all points are elements of one job"),
        ("output_dir=a,b", "all points are elements of one job"),
    ],
)
def test_what_is_no_sweep(text: str, what: str) -> None:
    with pytest.raises(ConfigError, match=what.replace(".", r"\.")):
        parse_axes([text])


def test_a_key_is_swept_once() -> None:
    with pytest.raises(ConfigError, match=r"--sweep optim\.lr is given twice"):
        parse_axes(["optim.lr=1,2", "optim.lr=3"])


def test_true_is_not_one() -> None:
    (axis,) = parse_axes(["a=true,1,1.5"])
    assert [value_name(value) for value in axis.values] == ["true", "1", "1.5"]


def test_the_product_in_the_order_of_its_keys(sweep) -> None:
    planned = sweep("optim.lr=1e-5,2e-5", "method.r=4,8", overrides=("train.seed=7",))
    assert planned.folder == Path("runs/x")
    assert planned.keys == ("optim.lr", "method.r")
    assert [point.name for point in planned.points] == [
        "lr-1e-05_r-4", "lr-1e-05_r-8", "lr-2e-05_r-4", "lr-2e-05_r-8",
    ]  # fmt: skip
    last = planned.points[-1]
    assert last.overrides == ("optim.lr=2e-5", "method.r=8")
    assert (last.config.optim.lr, last.config.method.r, last.config.train.seed) == (2e-5, 8, 7)


def test_files_apart_and_data_together(sweep, tmp_path: Path) -> None:
    planned = sweep("optim.lr=1e-5,2e-5", overrides=("checkpoint.mirror=s3://bucket/x/",))
    first, second = (point.config for point in planned.points)
    assert (first.output_dir, second.output_dir) == ("runs/x/lr-1e-05", "runs/x/lr-2e-05")
    assert first.data.cache_dir == second.data.cache_dir == str(tmp_path / "runs" / "data_cache"), "as without a sweep"
    assert second.checkpoint.mirror == "s3://bucket/x/lr-2e-05"
    assert second.logging.wandb.name == "x-lr-2e-05"
    named = sweep("optim.lr=1e-5,2e-5", overrides=("logging.wandb.name=mine", "data.cache_dir=/cache"))
    assert named.points[0].config.logging.wandb.name == "mine-lr-1e-05"
    assert named.points[0].config.data.cache_dir == "/cache"


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("optim.lx=1e-5,2e-5", r"run\.yaml with 'optim\.lx=1e-5': optim\.lx is not a key"),
        ("optim.lr=1e-5,big", r'run\.yaml with \'optim\.lr=big\': optim\.lr is "big"'),
        ("model.path.x=1,2", r"override 'model\.path\.x=1': model\.path is \"m\" in run\.yaml, not a section"),
        ("method.init=pissa,loftq", "loftq"),
    ],
)
def test_a_refusal_is_that_of_the_override(sweep, text: str, what: str) -> None:
    with pytest.raises(ConfigError, match=what):
        sweep(text)


def test_a_key_that_the_file_leaves_to_the_sweep(sweep) -> None:
    Path("run.yaml").write_text(CONFIG.replace(", max_steps: 3", ""))
    with pytest.raises(ConfigError, match=r"num_epochs|max_steps"):
        sweep("optim.lr=1e-5")
    assert [point.config.train.max_steps for point in sweep("train.max_steps=10,20").points] == [10, 20]


def test_names_are_readable_safe_and_no_others(sweep) -> None:
    def names(*texts: str) -> list[str]:
        return [point.name for point in sweep(*texts).points]

    assert names("train.seed=1,2") == ["seed-1", "seed-2"]
    assert names("optim.weight_decay=0,0.01") == ["weight_decay-0", "weight_decay-0.01"]
    assert names("method.target_modules=[q_proj, v_proj],all-linear") == [
        "target_modules-q_proj-v_proj", "target_modules-all-linear",
    ]  # fmt: skip
    assert names("data.train.0.weight=1,2", "data.train.1.weight=3") == [
        "0-weight-1_1-weight-3", "0-weight-2_1-weight-3",
    ]  # fmt: skip
    similar = names("model.path=/a/b,/a-b,/A/b")
    assert len({name.lower() for name in similar}) == 3
    assert all(name.startswith("path-a-b-") for name in (each.lower() for each in similar))
    (long,) = names(f"model.path={'/models/' + 'x' * 300}")
    assert len(long) < 60
    (japanese,) = names("model.path=/モデル")
    assert japanese.startswith("path-")
    assert len(japanese) > len("path-")


def test_short_keys_grow_until_they_differ() -> None:
    assert short_keys(["optim.lr"]) == ["lr"]
    assert short_keys(["optim.lr", "train.seed"]) == ["lr", "seed"]
    assert short_keys(["a.b.c", "d.b.c"]) == ["a-b-c", "d-b-c"]
    assert value_name(Value("-1", -1)) == "-1"


def test_what_is_written_can_be_read(sweep, tmp_path: Path) -> None:
    planned = sweep("optim.lr=1e-5,2e-5")
    submission = tmp_path / "runs" / "x" / "slurm" / "submission-001"
    submission.mkdir(parents=True)
    files = write_sweep(planned, submission)
    (found,) = read_sweeps(tmp_path / "runs" / "x")
    assert list(found.configs.values()) == files
    assert found.keys == ("optim.lr",)
    assert [load_config(path) for path in files] == [point.config for point in planned.points]
    with pytest.raises(ConfigError, match="holds no sweep"):
        read_sweeps(tmp_path)


def test_indices_of_an_array() -> None:
    assert expand_indices("3") == [3]
    assert expand_indices("[0-2,5%2]") == expand_indices("0-2,5%2") == [0, 1, 2, 5]
    assert expand_indices("") == []
