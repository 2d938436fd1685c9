"""``sft-dist model fetch`` against a hub on this machine, and a run afterwards that asks nobody."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from sft_dist.errors import ConfigError
from sft_dist.model import hub as hub_module
from sft_dist.model.hub import model_folder
from tests.helpers.fake_hub import FakeHub

TOKEN = "hf_averysecrettokenofthistest"
NEEDED = {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}


@pytest.fixture(scope="session")
def sharded_base(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model in several shards, beside much that training does not need."""
    folder = tmp_path_factory.mktemp("hub") / "tiny"
    shutil.copytree(tiny_base, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    AutoModelForCausalLM.from_pretrained(tiny_base).save_pretrained(folder, max_shard_size="100KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 2
    (folder / "original").mkdir()
    for name in (
        "pytorch_model.bin",
        "original/consolidated.00.pth",
        "consolidated.safetensors",
        "original/params.json",
    ):
        (folder / name).write_bytes(b"unneeded")
    (folder / "README.md").write_text("a model")
    return folder


@pytest.fixture
def hub(sharded_base: Path) -> Iterator[FakeHub]:
    with FakeHub(sharded_base) as served:
        yield served


Fetch = Callable[..., tuple[int, str]]


@pytest.fixture
def fetch(hub: FakeHub, tmp_path: Path) -> Fetch:
    """``fetch(path, *options, **environment)``: (exit code, all that it printed)."""

    def run(path: str = "org/tiny", *options: str, **environment: str) -> tuple[int, str]:
        process = start(hub, tmp_path, path, *options, **environment)
        out, _ = process.communicate(timeout=60)
        return process.returncode, out

    return run


def write_config(tmp_path: Path, path: str) -> None:
    (tmp_path / "run.yaml").write_text(
        f"model: {{path: {path}}}\nmethod: {{type: lora, r: 4}}\ndata: {{train: [{{path: a.jsonl}}]}}\n"
        "train: {global_batch_size: 1, max_steps: 2}\noutput_dir: runs/x\nlogging: {wandb: {mode: disabled}}\n"
    )


def start(
    hub: FakeHub, tmp_path: Path, path: str = "org/tiny", *options: str, **environment: str
) -> subprocess.Popen[str]:
    write_config(tmp_path, path)
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING"))}
    env = (
        kept
        | {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf"), "HF_TOKEN": TOKEN, "COLUMNS": "300"}
        | environment
    )
    return subprocess.Popen(
        [sys.executable, "-m", "sft_dist", "model", "fetch", "run.yaml", *options],
        cwd=tmp_path, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """This process reads the cache that ``fetch`` fills."""
    cache = tmp_path / "hf" / "hub"
    monkeypatch.setattr(hub_module.constants, "HF_HUB_CACHE", str(cache))
    return cache


def test_what_is_needed_and_nothing_else(fetch: Fetch, hub: FakeHub, cache: Path, sharded_base: Path) -> None:
    with pytest.raises(ConfigError, match=r"org/tiny is not in the local hub cache .*nothing of it is there") as caught:
        model_folder("org/tiny", None)
    assert caught.value.fix == "sft-dist model fetch CONFIG"
    code, out = fetch()
    assert code == 0, out
    folder = model_folder("org/tiny", None)
    names = {p.name for p in folder.iterdir()}
    weights = {p.name for p in sharded_base.glob("model*")}
    assert weights <= names <= weights | NEEDED, "no .bin, no .pth, no other format, no folder of another"
    for name in names:
        assert (folder / name).read_bytes() == (sharded_base / name).read_bytes()
    size = sum((sharded_base / name).stat().st_size for name in weights if name.endswith(".safetensors"))
    assert f"org/tiny is in {folder}: {size / 1e9:,.3f} GB of weights fetched" in out
    # Again: each file is there, none is sent again.
    before = hub.served.copy()
    code, out = fetch()
    assert (code, hub.served) == (0, before), out
    assert "nothing was missing" in out


def test_the_token_is_sent_and_never_shown(fetch: Fetch, hub: FakeHub) -> None:
    assert fetch()[0] == 0
    assert hub.tokens == {f"Bearer {TOKEN}"}
    assert hub.store_tokens == {None}, "another host has no business with it"
    hub.status, hub.error_code = 403, "GatedRepo"
    code, out = fetch("org/tiny", "--debug")
    assert code == 2
    assert "Traceback" in out
    assert TOKEN not in out


CHUNK = 10 << 20  # what huggingface_hub writes at a time; less than that is lost when a connection breaks
SIZE = 25 << 20


@pytest.fixture
def large(hub: FakeHub, tmp_path: Path) -> bytes:
    """Lets the hub serve one file of 25 MiB, and break off after 15."""
    hub.folder = tmp_path / "large"
    hub.folder.mkdir()
    (hub.folder / "config.json").write_text("{}")
    content = os.urandom(SIZE)
    (hub.folder / "model.safetensors").write_bytes(content)
    hub.break_after = 15 << 20
    return content


def test_an_interrupted_fetch_goes_on_in_the_middle_of_a_file(
    fetch: Fetch, hub: FakeHub, cache: Path, large: bytes
) -> None:
    code, out = fetch()
    assert code == 5, out
    assert "broke off" in out
    assert "what has come is kept" in out
    assert hub.served["model.safetensors"] == hub.break_after
    with pytest.raises(ConfigError, match=r"model\.safetensors is missing"):
        model_folder("org/tiny", None)
    model_folder("org/tiny", None, "config")
    hub.break_after = None
    hub.ranges.clear()
    code, out = fetch()
    assert code == 0, out
    assert "fetching 1 of 1 weight files, 0.016 GB, going on after 0.010 GB" in out
    assert hub.ranges == [f"model.safetensors from {CHUNK}"]
    assert hub.served["model.safetensors"] == (15 << 20) + SIZE - CHUNK
    assert (model_folder("org/tiny", None) / "model.safetensors").read_bytes() == large


@pytest.mark.ci
def test_a_damaged_part_is_found(fetch: Fetch, hub: FakeHub, cache: Path, large: bytes) -> None:
    fetch()
    hub.break_after = None
    part = next(cache.rglob("*.part"))
    assert part.stat().st_size == CHUNK
    part.write_bytes(b"\0" * CHUNK)
    code, out = fetch()
    assert code == 5
    assert "arrived damaged" in out
    code, out = fetch()
    assert code == 0, out


WAITING = "another process is fetching org/tiny: waiting for it"


def read_until_it_waits(process: subprocess.Popen[str], hub: FakeHub) -> str:
    """All that it prints; once it says that it waits, the hub sends the other one what that one asked for."""
    lines = []
    for line in process.stdout or ():
        lines.append(line)
        if WAITING in line:
            hub.released.set()
    return "".join(lines)


def test_two_at_a_time_fetch_once(hub: FakeHub, tmp_path: Path, cache: Path, sharded_base: Path) -> None:
    hub.released.clear()  # neither can end before the other has begun
    both = [start(hub, tmp_path) for _ in range(2)]
    with ThreadPoolExecutor() as threads:
        printed = list(threads.map(lambda process: read_until_it_waits(process, hub), both))
    assert [process.wait(60) for process in both] == [0, 0], printed
    assert sum(WAITING in out for out in printed) == 1
    for path in sharded_base.glob("model-*.safetensors"):
        assert hub.served[path.name] == path.stat().st_size
    model_folder("org/tiny", None)


def test_without_weights(fetch: Fetch, hub: FakeHub, cache: Path) -> None:
    assert fetch("org/tiny", "--no-weights")[0] == 0
    assert not any(name.endswith(".safetensors") for name in hub.served)
    model_folder("org/tiny", None, "config")
    model_folder("org/tiny", None, "tokenizer")
    with pytest.raises(ConfigError, match="is missing"):
        model_folder("org/tiny", None)


def test_a_folder_has_nothing_to_fetch(fetch: Fetch, hub: FakeHub, tiny_base: Path) -> None:
    code, out = fetch(str(tiny_base))
    assert (code, out) == (0, f"{tiny_base} is a folder on this machine: there is nothing to fetch\n")
    assert not hub.requests
    code, out = fetch("./absent")
    assert code == 2
    assert "the folder ./absent does not exist" in out


@pytest.mark.parametrize(
    ("status", "error_code", "code", "what", "fix"),
    [
        (403, "GatedRepo", 2, "org/tiny is gated", "set HF_TOKEN or run: hf auth login"),
        (401, "RepoNotFound", 2, "there is no model org/tiny on 127.0.0.1, or it is private", "correct the id"),
        (404, "RevisionNotFound", 2, "org/tiny has no revision", "a branch, a tag or a commit"),
        (403, None, 2, "the token may not read org/tiny", "the right to read it"),
        (503, None, 5, "answered 503", "run the command again later"),
    ],
)
def test_what_the_hub_refuses(
    fetch: Fetch, hub: FakeHub, status: int, error_code: str | None, code: int, what: str, fix: str
) -> None:
    hub.status, hub.error_code = status, error_code
    got, out = fetch()
    assert got == code, out
    lines = [line for line in out.splitlines() if line.startswith(("error:", "  fix:"))]
    assert len(lines) == 2
    assert what in lines[0]
    assert fix in lines[1]
    assert "Traceback" not in out
    assert TOKEN not in out


def test_no_way_to_the_hub(fetch: Fetch, hub: FakeHub) -> None:
    code, out = fetch(HF_ENDPOINT="http://user:password@127.0.0.1:9")
    assert code == 5
    assert "127.0.0.1 was not reached" in out
    assert "password" not in out
    code, out = fetch(HF_HUB_OFFLINE="1")
    assert code == 2
    assert "HF_HUB_OFFLINE is set" in out


def test_other_formats_alone(fetch: Fetch, hub: FakeHub, tmp_path: Path) -> None:
    hub.folder = tmp_path / "old"
    hub.folder.mkdir()
    (hub.folder / "config.json").write_text("{}")
    (hub.folder / "pytorch_model.bin").write_text("x")
    code, out = fetch()
    assert code == 2
    assert "has no model.safetensors, only other formats" in out
    assert "pytorch_model.bin" not in hub.served


@pytest.mark.ci
def test_a_run_reads_the_cache_and_asks_nobody(fetch: Fetch, hub: FakeHub, tmp_path: Path) -> None:
    """Nor does the process that proves final/, whose adapter names its base by the hub id."""
    assert fetch()[0] == 0
    write_config(tmp_path, "org/tiny")
    row = {"messages": [{"role": "user", "content": "say a"}, {"role": "assistant", "content": "a"}]}
    (tmp_path / "a.jsonl").write_text(json.dumps(row) + "\n")
    hub.requests = 0
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING"))}
    env = kept | {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf"), "DS_ACCELERATOR": "cpu"}
    command = [sys.executable, "-m", "sft_dist", "train", "run.yaml"]
    done = subprocess.run(command, cwd=tmp_path, env=env, text=True, capture_output=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "proven in a fresh process" in done.stdout
    adapter = json.loads((tmp_path / "runs/x/final/adapter_config.json").read_text())
    assert adapter["base_model_name_or_path"] == "org/tiny"
    assert hub.requests == 0
