"""What a user sees of a configuration that is right, and the exact words for one that is wrong."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from sft_dist.config.load import dump_config, load_config
from sft_dist.config.schema import AdamWConfig, Config, FullMethod, LoraMethod, SgdConfig
from sft_dist.errors import ConfigError

SMALLEST = """\
model: {path: m}
data: {train: [{path: a.jsonl}]}
train: {global_batch_size: 2, max_steps: 3}
output_dir: runs/x
"""

Load = Callable[..., Config]


@pytest.fixture
def load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Load:
    """Writes a configuration to run.yaml in the current directory and loads it."""
    monkeypatch.chdir(tmp_path)

    def write_and_load(text: str, *overrides: str) -> Config:
        Path("run.yaml").write_text(text, encoding="utf-8")
        return load_config("run.yaml", list(overrides))

    return write_and_load


@pytest.fixture
def error(load: Load) -> Callable[..., tuple[str, str]]:
    """What and fix of the one error that a configuration raises."""

    def load_and_fail(text: str, *overrides: str) -> tuple[str, str]:
        with pytest.raises(ConfigError) as caught:
            load(text, *overrides)
        for line in str(caught.value).splitlines():
            assert not any(noise in line for noise in ("pydantic", "tagged-union", "literal[", "list[", "Input should"))
        return caught.value.what, caught.value.fix

    return load_and_fail


# Reading


def test_defaults_fill_the_smallest_file(load: Load) -> None:
    config = load(SMALLEST)
    assert config.method == FullMethod()
    assert config.optim == AdamWConfig()
    assert config.train.max_steps == 3
    assert (config.sharding.strategy, config.activation_checkpointing.mode) == ("auto", "auto")


def test_scalars_are_yaml_1_2(load: Load) -> None:
    config = load(SMALLEST + "optim: {lr: 2e-4, eps: 1E-8}\nlogging: {wandb: {project: no, name: 2026-01-02}}\n")
    assert config.optim.lr == 2e-4
    assert config.optim == AdamWConfig(lr=2e-4, eps=1e-8)
    assert (config.logging.wandb.project, config.logging.wandb.name) == ("no", "2026-01-02")


def test_leading_zero_is_decimal(load: Load) -> None:
    assert load(SMALLEST, "train.seed=010").train.seed == 10


def test_aliases_and_merges(load: Load) -> None:
    data = "data:\n  train: [&a {path: a.jsonl, format: alpaca}]\n  eval: [{<<: *a, path: b.jsonl}]"
    config = load(SMALLEST.replace("data: {train: [{path: a.jsonl}]}", data))
    assert (config.data.eval[0].path, config.data.eval[0].format) == ("b.jsonl", "alpaca")


def test_relative_paths_stay_as_written(load: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load(SMALLEST)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert load_config(tmp_path / "run.yaml").output_dir == "runs/x"


def test_dump_loads_again_as_the_same_config(load: Load) -> None:
    hard_to_quote = ["output_dir='2e-4'", "logging.wandb.name='no'", "model.revision='0o17'", "model.path='a: b #c'"]
    config = load(SMALLEST, *hard_to_quote, "optim.lr=1e-9", "method={type: lora, target_modules: [q, v]}")
    assert config.output_dir == "2e-4"
    assert load(dump_config(config)) == config


# Overrides


def test_overrides_reach_sections_lists_and_whole_unions(load: Load) -> None:
    config = load(
        SMALLEST,
        "train.max_steps=7",
        "data.train.0.path=b.jsonl",
        "data.train.1.path=c.jsonl",  # one past the end appends
        "data.eval.0.path=d.jsonl",  # the file has no data.eval
        "logging.wandb={mode: disabled}",
        "method={type: lora, r: 4}",
    )
    assert config.train.max_steps == 7
    assert [source.path for source in config.data.train] == ["b.jsonl", "c.jsonl"]
    assert [source.path for source in config.data.eval] == ["d.jsonl"]
    assert config.logging.wandb.mode == "disabled"
    assert isinstance(config.method, LoraMethod)
    assert config.method.r == 4


def test_the_last_override_counts(load: Load) -> None:
    assert load(SMALLEST, "train.seed=1", "train.seed=2").train.seed == 2


def test_override_may_hold_equals_and_braces(load: Load) -> None:
    config = load(SMALLEST, "data.train=[{path: x=y.jsonl}]", "output_dir=a=b")
    assert (config.data.train[0].path, config.output_dir) == ("x=y.jsonl", "a=b")


def test_optimizer_without_its_type_is_adamw_and_its_type_alone_switches(load: Load) -> None:
    assert isinstance(load(SMALLEST, "optim.lr=1").optim, AdamWConfig)
    assert isinstance(load(SMALLEST + "optim: {lr: 1.0}\n", "optim.type=sgd").optim, SgdConfig)


def test_switching_a_union_drops_nothing_silently(error: Callable[..., tuple[str, str]], load: Load) -> None:
    lora = SMALLEST + "method: {type: lora, r: 4}\n"
    assert error(lora, "method.type=full") == (
        "run.yaml: method.r belongs to type lora or qlora, but method.type is full",
        "remove method.r, or replace the whole section: the override 'method={type: full}'",
    )
    assert load(lora, "method={type: full}").method == FullMethod()
    assert load(lora, "method.type=qlora").method.type == "qlora"


@pytest.mark.parametrize(
    ("override", "what", "fix"),
    [
        (
            "train.max_steps",
            "override 'train.max_steps' is not of the form key.path=value",
            "write e.g. train.max_steps=20 or 'data.eval=[{path: x.jsonl}]'",
        ),
        (
            "train..seed=1",
            "override 'train..seed=1' is not of the form key.path=value",
            "write e.g. train.max_steps=20 or 'data.eval=[{path: x.jsonl}]'",
        ),
        (
            "data.train.2.path=x",
            "override 'data.train.2.path=x': data.train is a list of 1 in run.yaml, '2' is no place in it",
            "use a number from 0 to 1 (1 appends)",
        ),
        (
            "output_dir.x=1",
            "override 'output_dir.x=1': output_dir is \"runs/x\" in run.yaml, not a section",
            "override output_dir as a whole: output_dir=...",
        ),
        (
            "data.train=[{path: x",
            "override 'data.train=[{path: x': the value is not YAML: while parsing a flow mapping, expected ',' or '}', "
            "but got '<stream end>'",
            "put the whole override in quotes and check its brackets",
        ),
        (
            r'method.target_modules=["re:.*layers\.0"]',
            "override 'method.target_modules=[\"re:.*layers\\\\.0\"]': the value is not YAML: while scanning a "
            "double-quoted scalar, found unknown escape character '.'",
            "put it into single quotes, or write each backslash twice",
        ),
    ],
)
def test_wrong_override(error: Callable[..., tuple[str, str]], override: str, what: str, fix: str) -> None:
    assert error(SMALLEST, override) == (what, fix)


# Keys


@pytest.mark.parametrize(
    ("extra", "what", "fix"),
    [
        ("method: {type: lora, rr: 3}", "run.yaml: method.rr is not a key", "did you mean method.r?"),
        ("max_steps: 3", "run.yaml: max_steps is not a key", "max_steps is a key elsewhere: write train.max_steps"),
        (
            "eval: {every_step: 3}",
            "run.yaml: eval.every_step is not a key",
            "did you mean eval.every_steps?",
        ),
        (
            "precision: {colour: 3}",
            "run.yaml: precision.colour is not a key",
            "remove it; the keys here are compute, master, reduce, optimizer_state",
        ),
        (
            "optim: {seeds: 3, max_grad: 1}",
            "run.yaml: optim.seeds is not a key; remove it; the keys here are lr, weight_decay, no_decay, schedule, "
            "warmup_ratio, max_grad_norm, lora_plus_ratio, type, beta1, beta2, eps, paged\n"
            "run.yaml: optim.max_grad is not a key; did you mean optim.max_grad_norm?",
            "correct these 2 places; `sft-dist config schema` describes every key",
        ),
        (
            "3: 4",
            "run.yaml: 3 is not a key",
            "remove it; the keys here are model, method, data, sharding, precision, activation_checkpointing, optim, "
            "train, spikes, eval, early_stopping, checkpoint, logging, watchdog, hardware, cluster, output_dir",
        ),
    ],
)
def test_unknown_key(error: Callable[..., tuple[str, str]], extra: str, what: str, fix: str) -> None:
    assert error(SMALLEST + extra + "\n") == (what, fix)


def test_unknown_key_in_a_list(error: Callable[..., tuple[str, str]]) -> None:
    what, _ = error(SMALLEST, "data.train=[{path: a, fromat: alpaca}]")
    assert what == "run.yaml with 'data.train=[{path: a, fromat: alpaca}]': data.train.0.fromat is not a key"


def test_unknown_section_from_an_override_names_the_override(error: Callable[..., tuple[str, str]]) -> None:
    assert error(SMALLEST, "trian.seed=3") == (
        "run.yaml with 'trian.seed=3': trian is not a key",
        "did you mean train?",
    )


def test_missing_keys_come_all_at_once(error: Callable[..., tuple[str, str]]) -> None:
    what, fix = error("model: {}\ndata: {train: [{path: a}]}\ntrain: {global_batch_size: 1}\n")
    assert what.splitlines() == [
        "run.yaml: model.path is missing; add model.path: text (Folder in Hugging Face layout, or a hub id that "
        "`sft-dist model fetch` brought into the hub cache.)",
        "run.yaml: output_dir is missing; add output_dir: text (Run directory; must not hold another run, unless that run is resumed.)",
    ]
    assert fix == "correct these 2 places; `sft-dist config schema` describes every key"


# Values


@pytest.mark.parametrize(
    ("override", "what", "fix"),
    [
        ("train.seed=-1", "train.seed is -1", "set train.seed to a whole number >= 0"),
        ("train.max_steps=1.5", "train.max_steps is 1.5", "set train.max_steps to a whole number >= 1 or null"),
        ("train.seed='4'", 'train.seed is "4"', "set train.seed to a whole number >= 0"),
        ("train.seed=true", "train.seed is true", "set train.seed to a whole number >= 0"),
        (
            "train.micro_batch_size=0",
            "train.micro_batch_size is 0",
            "set train.micro_batch_size to a whole number >= 1 or auto",
        ),
        (
            "train.micro_batch_size=all",
            'train.micro_batch_size is "all"',
            "set train.micro_batch_size to a whole number >= 1 or auto",
        ),
        ("optim.lr=0", "optim.lr is 0", "set optim.lr to a number > 0"),
        ("optim.lr=.nan", "optim.lr is NaN", "set optim.lr to a number > 0"),
        ("optim.beta1=1", "optim.beta1 is 1", "set optim.beta1 to a number >= 0 and < 1"),
        ("precision.compute=fp16", 'precision.compute is "fp16"', "set precision.compute to bf16 or fp32"),
        (
            "sharding={strategy: zero3, deepspeed_config: 5}",
            "sharding.deepspeed_config is 5",
            "set sharding.deepspeed_config to text, a section or null",
        ),
        (
            "sharding.strategy=zero4",
            'sharding.strategy is "zero4"',
            "set sharding.strategy to auto, ddp, fsdp2, zero1, zero2 or zero3",
        ),
        (
            "sharding.reshard_after_forward=no",
            "sharding.strategy is missing",
            "set sharding.strategy to auto, ddp, fsdp2, zero1, zero2 or zero3",
        ),
        ("optim.type=adam", 'optim.type is "adam"', "set optim.type to adamw, adafactor or sgd"),
        ("optim=sgd", 'optim is "sgd"', "make optim a section with type: adamw, adafactor or sgd"),
        (
            "logging.wandb=false",
            "logging.wandb is false",
            "make logging.wandb a section with any of the keys mode, project, name",
        ),
        ("output_dir=", "output_dir is null", "set output_dir to text"),
        (
            "data.train=[]",
            "data.train is []",
            "set data.train to a list (not empty) of sections with the keys path (and optionally format, split, subset, revision, columns, templates, name, weight, share)",
        ),
        (
            "data.train=[x]",
            'data.train.0 is "x"',
            "make data.train.0 a section with the keys path (and optionally format, split, subset, revision, columns, templates, name, weight, share)",
        ),
        (
            "method={type: lora, target_modules: 3}",
            "method.target_modules is 3",
            "set method.target_modules to all-linear, attention, mlp or a list of text",
        ),
        ("method={type: lora, dropout: 1}", "method.dropout is 1", "set method.dropout to a number >= 0 and < 1"),
        ("method.r=3", "method.type is missing", "set method.type to full, lora, qlora, prompt, p_tuning or prefix"),
    ],
)
def test_wrong_value(error: Callable[..., tuple[str, str]], override: str, what: str, fix: str) -> None:
    found_what, found_fix = error(SMALLEST, override)
    file, _, problem = found_what.partition(": " + what.split(" ")[0])
    assert file in ("run.yaml", f"run.yaml with {override!r}")
    assert (what.split(" ")[0] + problem, found_fix) == (what, fix)


def test_value_from_an_override_names_the_override_and_one_from_the_file_the_file(
    error: Callable[..., tuple[str, str]],
) -> None:
    what, _ = error(SMALLEST + "optim: {lr: -1.0, eps: x}\n", "optim.lr=-2.0")
    assert what.splitlines()[0].startswith("run.yaml with 'optim.lr=-2.0': optim.lr is -2.0;")
    assert what.splitlines()[1].startswith('run.yaml: optim.eps is "x";')


def test_of_two_overrides_the_one_that_counts_is_named(error: Callable[..., tuple[str, str]]) -> None:
    what, _ = error(SMALLEST, "train.seed=-1", "train={global_batch_size: 1, seed: -2}", "train.seed=-3")
    assert what == "run.yaml with 'train.seed=-3': train.seed is -3"


# Files


def test_missing_file_suggests_its_neighbour(load: Load) -> None:
    load(SMALLEST)
    with pytest.raises(ConfigError) as caught:
        load_config("runn.yaml")
    assert (caught.value.what, caught.value.fix) == ("runn.yaml: no such file", "did you mean run.yaml?")
    for unrelated in ("s.yaml", "support.yaml", "rest.yaml", "other.yml"):
        with pytest.raises(ConfigError) as caught:
            load_config(unrelated)
        assert caught.value.fix.startswith("give an existing YAML file"), "an ending alone is no resemblance"


def test_missing_file_and_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError) as caught:
        load_config("no/such.yaml")
    assert caught.value.what == "no/such.yaml: no such file"
    assert caught.value.fix == f"give an existing YAML file; the current directory is {tmp_path}"
    with pytest.raises(ConfigError, match="is a folder"):
        load_config(tmp_path)


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("", "run.yaml: the file is empty"),
        ("# nothing\n", "run.yaml: the file is empty"),
        ("- a\n", "run.yaml: holds a list, not keys and values"),
        ("abc\n", 'run.yaml: holds "abc", not keys and values'),
        (
            "model: {path: m}\ndata: [\n",
            "run.yaml, line 3: while parsing a flow node, expected the node content, but found '<stream end>'",
        ),
        ("a: b: c\n", "run.yaml, line 1: mapping values are not allowed here"),
        (
            "train:\n  seed: 1\n  max_steps: 2\n  seed: 3\n",
            "run.yaml, line 4: key 'seed' is given twice (first in line 2)",
        ),
        (
            "a: !!python/object:os.system x\n",
            "run.yaml, line 1: could not determine a constructor for the tag 'tag:yaml.org,2002:python/object:os.system'",
        ),
    ],
)
def test_file_that_is_no_configuration(error: Callable[..., tuple[str, str]], text: str, what: str) -> None:
    assert error(text)[0] == what


def test_file_that_is_not_utf8(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_bytes(b"model: {path: caf\xe9}\n")
    with pytest.raises(ConfigError, match=r"not UTF-8 text \(byte 17\)"):
        load_config(tmp_path / "run.yaml")
