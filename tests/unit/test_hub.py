"""What a disk may do to a fetch; the rest is tested against a hub in ``tests/launch/test_fetch.py``."""

from __future__ import annotations

import errno
import json
import shutil
from collections import defaultdict
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
from transformers import PreTrainedTokenizerBase

from sft_dist.config.schema import PromptMethod, QloraMethod
from sft_dist.data.tokenizer import load_tokenizer
from sft_dist.errors import CheckpointError, ConfigError
from sft_dist.model import build, hub_fetch, initial_virtual_tokens, skip, support, tokens, weights
from sft_dist.model.describe import describe_model
from sft_dist.model.hub import model_folder, weight_files
from sft_dist.model.hub_fetch import _answers, _Blob, _fetch_weights


def test_a_disk_that_is_too_small_is_told_before_anything_comes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What has come already needs no more room."""
    blob = _Blob("model.safetensors", "url", tmp_path / "digest", 140_000_000_000)
    blob.partial.write_bytes(b"some")
    monkeypatch.setattr(hub_fetch, "_blobs", lambda *_: [blob])
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=139_999_999_995))
    with pytest.raises(CheckpointError, match=r"org/m does not fit .*140\.0 GB are to come, 140\.0 GB are free"):
        _fetch_weights("org/m", "main", ["model.safetensors"], lambda _: None)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=139_999_999_996))
    monkeypatch.setattr(hub_fetch, "_fetch_blob", lambda _: None)
    assert _fetch_weights("org/m", "main", ["model.safetensors"], lambda _: None) == 139_999_999_996


@pytest.mark.parametrize(
    ("error", "what", "fix"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "the disk is full", "make room"),
        (PermissionError(errno.EACCES, "Permission denied"), "cannot be written (Permission denied)", "set HF_HOME"),
    ],
)
def test_a_disk_that_takes_no_more(error: OSError, what: str, fix: str) -> None:
    with pytest.raises(CheckpointError) as caught, _answers("org/m", None):
        raise error
    assert what in caught.value.what
    assert fix in caught.value.fix


def test_a_defect_is_no_answer_of_the_hub() -> None:
    with pytest.raises(ZeroDivisionError), _answers("org/m", None):
        raise ZeroDivisionError


@pytest.mark.parametrize("path", ["a/b/c", "no model", "../absent", "/absent", "~/absent"])
def test_what_is_neither_a_folder_nor_an_id(path: str) -> None:
    with pytest.raises(ConfigError, match=r"neither a model folder nor a hub id|does not exist"):
        model_folder(path, None)


def test_the_index_names_the_weights(tmp_path: Path) -> None:
    assert weight_files(tmp_path) == []
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "2.safetensors", "b": "1.safetensors", "c": "2.safetensors"}}))
    assert weight_files(tmp_path) == ["1.safetensors", "2.safetensors"]
    index.write_text("[]")
    with pytest.raises(CheckpointError, match="is not an index"):
        weight_files(tmp_path)
    # An index may be left over from the model that was in the folder before; Transformers looks at the file first.
    (tmp_path / "model.safetensors").touch()
    assert weight_files(tmp_path) == ["model.safetensors"]


def test_all_of_a_model_is_of_the_revision_that_was_asked_for(tiny_base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights to train and weights to measure, configuration and tokenizer: the branch main may hold others."""
    asked: dict[str, set[tuple[str, str | None]]] = defaultdict(set)

    def answer(module: ModuleType) -> None:
        def folder(path: str, revision: str | None, part: str = "weights") -> Path:
            asked[module.__name__.rpartition(".")[2]].add((path, revision))
            return tiny_base

        monkeypatch.setattr(module, "model_folder", folder)

    for module in (build, skip, support, tokens, weights):
        answer(module)
    qlora = QloraMethod.model_validate({"type": "qlora", "quantization": {"skip": "auto"}})
    weights.check_weights(describe_model("org/m", "v2", qlora, "fp32", ("<tool>",)))
    tokenizer = load_tokenizer(str(tiny_base))

    def from_pretrained(path: str, revision: str | None = None) -> PreTrainedTokenizerBase:
        asked["virtual_tokens"].add((path, revision))
        return tokenizer

    monkeypatch.setattr(initial_virtual_tokens, "AutoTokenizer", SimpleNamespace(from_pretrained=from_pretrained))
    prompt = PromptMethod.model_validate({"type": "prompt", "init_text": "Say: "})
    weights.check_weights(describe_model("org/m", "v2", prompt, "fp32"))
    skip.measure.cache_clear()  # of a model that is nowhere
    readers = {"build", "skip", "support", "tokens", "weights", "virtual_tokens"}
    assert asked == {reader: {("org/m", "v2")} for reader in readers}
