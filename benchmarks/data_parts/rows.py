"""Rows a second from conversations to packs of tokens with a mask, on one core, against TRL's ``SFTTrainer``.

Each measurement is a process of its own. It prepares eight other rows twice before, and the time of the second time is
subtracted: what is left is that of the rows, without imports and set-up. It is CPU time, which other processes on the
machine do not add to. Run as a module this is such a process:
``python -m benchmarks.data_parts.rows SIDE CORE TOKENIZER WARM_UP ROWS RESULT``.
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.data_parts.peers import ROOT, install_trl

CAPACITY = 4096
WARM_UP_ROWS = 8
SIDES = {
    "sft_dist": "sft_dist",
    "trl": "TRL SFTTrainer",
    "trl_unmasked": "TRL SFTTrainer, prompts trained too",
    "encode": "tokenizer.encode alone, for orientation",
}


@dataclass(frozen=True)
class RowRate:
    """What one side made of the rows; an error instead of figures where it refuses them."""

    language: str
    template: str
    side: str
    rows: int
    seconds: float = float("nan")
    tokens: int = 0
    supervised: int = 0
    packs: int = 0
    peak_rss_gib: float = float("nan")
    wall_seconds: float = float("nan")
    error: str = ""

    @property
    def rows_per_s(self) -> float:
        return self.rows / self.seconds


def measure(*, rows: int, with_peer: bool) -> Iterator[RowRate]:
    from benchmarks.data_parts import texts

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for template, source in texts.TEMPLATES.items():
            print(f"training a tokenizer, {template}", file=sys.stderr)
            texts.save_tokenizer(folder / template, source)
        for language, short in texts.LANGUAGES.items():
            warm_up, file = folder / f"{short} first.jsonl", folder / f"{short}.jsonl"
            texts.write_rows(warm_up, short, WARM_UP_ROWS, seed=2)
            texts.write_rows(file, short, rows, seed=3)
            for template in texts.TEMPLATES:
                peers = ["trl"] if "with gen" in template else ["trl", "trl_unmasked"]
                for side in ["sft_dist", *(peers if with_peer else []), "encode"]:
                    print(f"{rows:,} rows, {language}, {template}: {SIDES[side]}", file=sys.stderr)
                    figures = _in_process(side, folder / template, warm_up, file, folder / "result.json")
                    yield RowRate(language=language, template=template, side=SIDES[side], rows=rows, **figures)


def _in_process(side: str, tokenizer: Path, warm_up: Path, file: Path, result: Path) -> dict[str, Any]:
    return finish(start(side, tokenizer, warm_up, file, result, core=min(os.sched_getaffinity(0))), result)


def start(
    side: str, tokenizer: Path, warm_up: Path, file: Path, result: Path, *, core: int | None
) -> subprocess.Popen[str]:
    """A process that prepares the two files and writes figures of the second into ``result``.

    Args:
        core: that it is bound to, or None for all.
    """
    result.unlink(missing_ok=True)
    environment = os.environ | {
        "TOKENIZERS_PARALLELISM": "false",
        "OMP_NUM_THREADS": "1",
        "TQDM_DISABLE": "1",
        "HF_DATASETS_CACHE": str(result.parent / "datasets"),
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT), *([str(install_trl())] if side.startswith("trl") else [])]),
        "PYTHONWARNINGS": "ignore",
    }
    values = [side, "all" if core is None else core, tokenizer, warm_up, file, result]
    command = [sys.executable, "-m", "benchmarks.data_parts.rows", *map(str, values)]
    return subprocess.Popen(
        command, env=environment, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )


def finish(process: subprocess.Popen[str], result: Path) -> dict[str, Any]:
    _, errors = process.communicate()
    if process.returncode:
        raise SystemExit(f"{process.args} ended with code {process.returncode}:\n{errors[-4000:]}")
    return json.loads(result.read_text(encoding="utf-8"))


# Of a file of rows: what became of them.
Prepare = Callable[[Path], dict[str, int]]


def sft_dist(tokenizer: Path) -> Prepare:
    from sft_dist.config.data_schema import DataConfig, SourceConfig
    from sft_dist.data.cache import Cache
    from sft_dist.data.chat_template import load_renderer
    from sft_dist.data.prepare import prepare_set
    from sft_dist.data.prepared import open_prepared

    load = functools.partial(load_renderer, str(tokenizer), None, None)  # what a worker process can be told
    renderer = load()

    def run(file: Path) -> dict[str, int]:
        data = DataConfig(train=[SourceConfig(path=str(file))], max_seq_len=CAPACITY, over_length="truncate")
        # A cache of its own each time: nothing is found prepared.
        cache = Cache(Path(tempfile.mkdtemp(dir=file.parent)), renderer, load)
        folder = prepare_set(data, cache)
        assert folder is not None
        made = open_prepared(folder)
        return {
            "tokens": int(made.num_tokens.sum()),
            "supervised": int(made.num_supervised.sum()),
            "packs": made.num_sequences,
        }

    return run


def trl(tokenizer: Path, *, masked: bool = True) -> Prepare:
    from datasets import Dataset
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
    from trl import SFTConfig, SFTTrainer

    loaded = AutoTokenizer.from_pretrained(tokenizer)
    tiny = LlamaConfig(
        vocab_size=len(loaded), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=1
    )

    def run(file: Path) -> dict[str, int]:
        rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        trainer = SFTTrainer(
            model=LlamaForCausalLM(tiny),
            args=SFTConfig(
                output_dir=str(file.parent / "trl"),
                packing=True,
                packing_strategy="bfd",
                assistant_only_loss=masked,
                max_length=CAPACITY,
                report_to=[],
                use_cpu=True,
                bf16=False,
            ),
            train_dataset=Dataset.from_list(rows),
            processing_class=loaded,
        )
        made = trainer.train_dataset.with_format("arrow")[:]
        labels = made["labels"].combine_chunks().flatten().to_numpy()
        return {"tokens": len(labels), "supervised": int((labels != -100).sum()), "packs": len(made)}

    return run


def encode(tokenizer: Path) -> Prepare:
    from transformers import AutoTokenizer

    loaded = AutoTokenizer.from_pretrained(tokenizer)

    def run(file: Path) -> dict[str, int]:
        rows = [json.loads(line)["messages"] for line in file.read_text(encoding="utf-8").splitlines()]
        texts = ["\n".join(message["content"] for message in row) for row in rows]
        started = time.process_time()
        tokens = sum(len(loaded.encode(text)) for text in texts)
        return {"tokens": tokens, "seconds": time.process_time() - started}

    return run


def peak_rss_gib() -> float:
    """Of this process since its start; ``getrusage`` counts the process that it was forked from too."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM")) / 2**20


def main(side: str, core: str, tokenizer: str, warm_up: str, file: str, result: str) -> None:
    if core != "all":
        os.sched_setaffinity(0, {int(core)})
    made: dict[str, Any] = {}
    makers = {"sft_dist": sft_dist, "trl": trl, "trl_unmasked": lambda t: trl(t, masked=False), "encode": encode}
    try:
        prepare = makers[side](Path(tokenizer))
        seconds, wall_seconds = [], []
        for each in (warm_up, warm_up, file):
            started, wall_started = time.process_time(), time.perf_counter()
            made = prepare(Path(each))
            seconds.append(time.process_time() - started)
            wall_seconds.append(time.perf_counter() - wall_started)
        made = {
            "seconds": seconds[2] - seconds[1],
            "wall_seconds": wall_seconds[2] - wall_seconds[1],
            "peak_rss_gib": peak_rss_gib(),
        } | made
    except ValueError as refusal:  # TRL's way to say that it cannot find the answers
        made = {"error": str(refusal).split(" (")[0]}
    Path(result).write_text(json.dumps(made), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
