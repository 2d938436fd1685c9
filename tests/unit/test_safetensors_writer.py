"""A streamed safetensors file is one like any other, whatever parts it came in; half of one is an error."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from sft_dist.errors import CheckpointError
from sft_dist.model.safetensors_folder import SafetensorsFolder, UnmappedFolder
from sft_dist.model.safetensors_writer import SafetensorsWriter, TensorPlan, plan_files


def tensors() -> dict[str, Tensor]:
    torch.manual_seed(0)
    return {
        "ünicode.weight": torch.randn(7, 5).bfloat16(),
        "flag": torch.tensor([True, False, True]),
        "a.bias": torch.randn(3),
        "scalar": torch.tensor(5),
        "empty": torch.empty(0, 4),
        "half": torch.randn(11, 3, 2).half(),
        "bytes": torch.arange(9, dtype=torch.uint8),
    }


def plans(values: dict[str, Tensor]) -> list[TensorPlan]:
    return [TensorPlan(name, value.dtype, tuple(value.shape)) for name, value in values.items()]


def write(folder: Path, values: dict[str, Tensor], *, part: int, max_file_bytes: int = 1 << 20) -> list[Path]:
    """In parts of ``part`` elements, the last tensor first."""
    with SafetensorsWriter(folder, plans(values), max_file_bytes=max_file_bytes) as writer:
        for name, value in reversed(values.items()):
            for some in value.flatten().split(part):
                writer.write(name, some)
        files = list(writer.files)
        writer.finish()
    return files


def same(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and one.shape == other.shape and torch.equal(one, other)


@pytest.mark.parametrize("part", [1, 4, 1000])
def test_one_file_is_read_by_the_library(tmp_path: Path, part: int) -> None:
    (file,) = write(tmp_path, tensors(), part=part)
    assert file.name == "model.safetensors"
    loaded = load_file(file)
    assert loaded.keys() == tensors().keys()
    assert all(same(loaded[name], value) for name, value in tensors().items())
    with safe_open(file, framework="pt") as opened:
        assert opened.metadata() == {"format": "pt"}
    assert [p.name for p in tmp_path.iterdir()] == ["model.safetensors"], "no index for one file"


def test_several_files_have_an_index(tmp_path: Path) -> None:
    values = {f"layer.{n}": torch.full((5,), float(n)) for n in range(7)}
    files = write(tmp_path, values, part=2, max_file_bytes=45)
    assert [file.name for file in files] == [f"model-{n:05d}-of-00004.safetensors" for n in range(1, 5)]
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 7 * 5 * 4
    assert index["weight_map"].keys() == values.keys()
    for name, file in index["weight_map"].items():
        assert same(load_file(tmp_path / file)[name], values[name])


def test_a_tensor_larger_than_the_limit_has_a_file_of_its_own() -> None:
    sizes = [4, 4, 40, 4, 10, 1]
    files = plan_files([TensorPlan(str(n), torch.uint8, (size,)) for n, size in enumerate(sizes)], 12)
    assert [[plan.num_bytes for plan in file] for file in files] == [[4, 4], [40], [4], [10, 1]]


def test_what_is_not_complete_is_an_error(tmp_path: Path) -> None:
    with SafetensorsWriter(tmp_path, [TensorPlan("x", torch.float32, (4,))], max_file_bytes=99) as writer:
        writer.write("x", torch.ones(3))
        with pytest.raises(ValueError, match="3 of 4"):
            writer.finish()
        with pytest.raises(ValueError, match="none of it"):
            writer.write("x", torch.ones(2))
        with pytest.raises(ValueError, match="none of it"):
            writer.write("x", torch.ones(1).half())
        writer.write("x", torch.ones(1))
        writer.finish()
    assert same(load_file(tmp_path / "model.safetensors")["x"], torch.ones(4))


def test_a_name_is_written_once(tmp_path: Path) -> None:
    twice = [TensorPlan("x", torch.float32, (4,))] * 2
    with pytest.raises(ValueError, match="twice"):
        SafetensorsWriter(tmp_path, twice, max_file_bytes=99)


def test_an_unmapped_folder_reads_what_a_mapped_one_does(tmp_path: Path) -> None:
    write(tmp_path, tensors(), part=100, max_file_bytes=64)
    mapped, unmapped = SafetensorsFolder(tmp_path), UnmappedFolder(tmp_path)
    assert mapped.tensors == unmapped.tensors
    for name, value in tensors().items():
        for start, stop in ((0, value.numel()), (1, value.numel() - 1), (0, 0)):
            if 0 <= start <= stop:
                assert same(unmapped.read(name, start, stop), value.flatten()[start:stop]), name
                assert same(mapped.read(name, start, stop), value.flatten()[start:stop]), name


def test_a_file_that_is_cut_later_is_told(tmp_path: Path) -> None:
    (file,) = write(tmp_path, {"x": torch.ones(100)}, part=100)
    unmapped = UnmappedFolder(tmp_path)
    with file.open("r+b") as opened:
        opened.truncate(file.stat().st_size - 8)
    assert unmapped.read("x", 0, 98).sum() == 98
    with pytest.raises(CheckpointError, match="it ends within x"):
        unmapped.read("x", 90, 100)
