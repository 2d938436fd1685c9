"""A shard is a safetensors file that others can read, holds the very bits, and says what is wrong with values."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from sft_dist.checkpoint import shard_file
from sft_dist.checkpoint.manifest import MANIFEST, Identity, Manifest, Position
from sft_dist.checkpoint.proof import digest_of, prove_file, tensor_record
from sft_dist.checkpoint.reader import CheckpointReader
from sft_dist.checkpoint.shard_file import Piece, is_finite, is_zero, write_shard

FLOATS = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def some(dtype: torch.dtype, n: int = 5) -> Tensor:
    return (torch.arange(n) * 3 - 4).abs().to(dtype)


@pytest.mark.parametrize("dtype", [*FLOATS, torch.uint8, torch.int8, torch.int32, torch.int64])
def test_others_read_the_same_bits(tmp_path: Path, dtype: torch.dtype) -> None:
    pieces = {"a": Piece(7, some(dtype)), "b": Piece(0, some(dtype, 1)), "c": Piece(3, some(torch.float32, 3))}
    record = write_shard(tmp_path / "file", pieces)
    found = load_file(tmp_path / "file")
    assert found.keys() == pieces.keys()
    for name, piece in pieces.items():
        assert found[name].dtype == piece.values.dtype
        assert torch.equal(found[name], piece.values)
    assert record.ranges == {"a": (7, 12), "b": (0, 1), "c": (3, 6)}
    assert (record.num_bytes, record.digest) == digest_of(tmp_path / "file")
    assert prove_file(tmp_path / "file", record, pieces).problems == ()


def test_more_than_a_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shard_file, "BLOCK_BYTES", 64)
    values = torch.randn(1000)
    write_shard(tmp_path / "file", {"a": Piece(0, values)})
    assert torch.equal(load_file(tmp_path / "file")["a"], values)
    values[999] = torch.inf
    assert not is_finite(values)
    assert not is_zero(torch.zeros(1000).index_fill_(0, torch.tensor(999), 1))


@pytest.mark.parametrize("dtype", FLOATS)
def test_what_is_not_finite(dtype: torch.dtype) -> None:
    largest = torch.tensor(
        [torch.finfo(dtype).max, torch.finfo(dtype).min, 0, -0.0, torch.finfo(dtype).tiny], dtype=dtype
    )
    assert is_finite(largest)
    for value in (torch.nan, torch.inf, -torch.inf, -torch.nan):
        assert not is_finite(torch.cat([largest, torch.tensor([value], dtype=dtype)]))


@pytest.mark.parametrize("dtype", FLOATS)
def test_what_is_zero(dtype: torch.dtype) -> None:
    assert is_zero(torch.tensor([0.0, -0.0], dtype=dtype))
    smallest = torch.tensor([torch.finfo(dtype).smallest_normal], dtype=dtype) / 2
    assert not is_zero(smallest)
    assert not is_zero(torch.tensor([0.0, torch.nan], dtype=dtype))


def test_a_header_that_says_something_else_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its digest is right: it is what was meant to be written."""
    pieces = {"a": Piece(0, some(torch.float32))}
    header = shard_file.header
    for name, size in (("b", 5), ("a", 4)):
        plans = [shard_file.TensorPlan(name, torch.float32, (size,))]
        monkeypatch.setattr(shard_file, "header", lambda _, plans=plans: (header(plans)[0], {"a": 0}))
        record = write_shard(tmp_path / "file", pieces)
        assert prove_file(tmp_path / "file", record, pieces).problems != (), (name, size)


def test_any_range_is_read_from_any_files(tmp_path: Path) -> None:
    whole = torch.randn(4, 5)
    flat = whole.view(-1)
    files = {}
    for number, (first, stop) in enumerate([(0, 3), (3, 11), (11, 20)]):
        name = shard_file.file_name(number, 3)
        files[name] = write_shard(tmp_path / name, {"model.a": Piece(first, flat[first:stop].clone())})
    manifest = Manifest(
        position=Position(completed_steps=1), strategy="zero3", world_size=3, identity=Identity(values={}),
        tensors={"model.a": tensor_record(whole, (4, 5))}, files=files,
    )  # fmt: skip
    (tmp_path / MANIFEST).write_text(manifest.text())
    with CheckpointReader(tmp_path) as reader:
        assert reader.names == ("model.a",)
        assert torch.equal(reader.read("model.a"), whole)
        for first in range(20):
            for stop in range(first, 21):
                values = torch.full((stop - first,), torch.nan)
                reader.read_into(values, "model.a", first=first)
                assert torch.equal(values, flat[first:stop])
