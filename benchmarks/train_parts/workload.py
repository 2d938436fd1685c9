"""What all sides train: a model, an adapter, and packs of rows, made here from a seed; nothing is downloaded.

A Llama of one of ``sizes.SIZES`` with random weights, and rows of made-up words: their lengths are lognormal around
some 250 tokens, two thirds of each are supervised. Packs are those of this project, handed to every side in the order
in which this project trains them.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
import yaml
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from benchmarks.train_parts.sizes import METHODS, RANK, SIZES, Size, Step
from tests.helpers.big_model import write_checkpoint

# Tokens that the tokenizer has; a model has as many or more.
VOCAB = 8192

ROWS, WORDS, MAX_WORDS = 4000, 9000, 900
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@dataclass(frozen=True)
class Task:
    """One run of any side; a peer reads it as JSON.

    Args:
        method: full, lora or qlora.
        length: most tokens of a pack.
        accumulation: packs of a step.
        packs: a file with a pack a line, ``input_ids``, ``labels`` and ``seq_lengths``, in the order of training.
        report: where the run writes what it measured of itself.
    """

    method: str
    compute: str
    length: int
    accumulation: int
    steps: int
    threads: int
    base: str
    adapter: str | None
    packs: str
    scratch: str
    report: str
    lr: float = 1e-4

    def to_json(self) -> str:
        return json.dumps(asdict(self))


@dataclass
class Workload:
    """A folder with everything; what is there already is taken as it is."""

    folder: Path
    size: Size = SIZES["33m"]
    base: Path = field(init=False)
    adapter: Path = field(init=False)

    def __post_init__(self) -> None:
        self.base, self.adapter = self.folder / "base", self.folder / "adapter"
        if not (self.adapter / "adapter_config.json").exists():
            self.base.mkdir(parents=True, exist_ok=True)
            self._write_rows_and_tokenizer()
            self._write_model()

    def config(self, method: str, length: int, *, accumulation: int, steps: int, compute: str, name: str) -> Path:
        """Of a run of this project."""
        settings = METHODS[method] | ({} if method == "full" else {"init_from": str(self.adapter)})
        config = {
            "model": {"path": str(self.base)},
            "method": settings,
            "data": {
                "train": [{"path": str(self.folder / "rows.jsonl")}], "max_seq_len": length, "packing": "best_fit",
                "cache_dir": str(self.folder / "cache"), "over_length": "truncate",
            },
            "sharding": {"strategy": "ddp"},
            "precision": {"compute": compute},
            "activation_checkpointing": {"mode": "none"},
            "optim": {"lr": 1e-4, "weight_decay": 0.0, "schedule": "constant", "warmup_ratio": 0.0, "beta2": 0.999},
            "train": {"global_batch_size": accumulation, "micro_batch_size": 1, "max_steps": steps},
            "checkpoint": {"prove_final": False},
            "logging": {"wandb": {"mode": "disabled"}},
            "output_dir": str(self.folder / "runs" / name),
        }  # fmt: skip
        path = self.folder / f"{name}.yaml"
        path.write_text(yaml.safe_dump(config))
        return path

    def packs(self, config: Path) -> tuple[Path, list[Step]]:
        """The packs of all steps of a run, as a peer reads them, and what is in them; prepares them."""
        from sft_dist.config.load import load_config
        from sft_dist.data.batch import BatchPlan
        from sft_dist.data.cache import Cache
        from sft_dist.data.loader import TrainingOrder
        from sft_dist.data.prepare import prepare_set
        from sft_dist.data.prepared import open_prepared
        from sft_dist.model.renderer import renderer_of

        checked = load_config(config)
        load = renderer_of(checked.model, checked.data)
        folder = prepare_set(checked.data, Cache(self.folder / "cache", load(), load, checked.data.num_workers))
        assert folder is not None
        data = open_prepared(folder)
        batch = checked.train.global_batch_size
        order = TrainingOrder(data, BatchPlan(batch, 1, 1, checked.data.max_seq_len), checked.train.seed)
        path, steps = config.with_suffix(".packs.jsonl"), []
        assert checked.train.max_steps is not None
        with path.open("w") as file:
            for number in range(checked.train.max_steps):
                segments: list[int] = []
                step = order.step(number)
                for sequence in step.sequences:
                    rows = [data.row(row) for row in data.packs[sequence]]
                    ids = [int(token) for tokens, _ in rows for token in tokens]
                    mask = [bool(bit) for _, bits in rows for bit in bits]
                    lengths = [len(tokens) for tokens, _ in rows]
                    labels = [token if bit else -100 for token, bit in zip(ids, mask, strict=True)]
                    file.write(json.dumps({"input_ids": ids, "labels": labels, "seq_lengths": lengths}) + "\n")
                    segments += lengths
                steps.append(Step(tuple(segments), step.supervised_tokens))
        return path, steps

    def _write_rows_and_tokenizer(self) -> None:
        rng = np.random.default_rng(0)
        syllables = [consonant + vowel for consonant in "bcdfghjklmnprstvwz" for vowel in "aeiou"]
        words = sorted({"".join(rng.choice(syllables, size=rng.integers(1, 5))) for _ in range(WORDS)})
        rng.shuffle(words)
        share = 1 / np.arange(1, len(words) + 1) ** 0.9

        def text(count: int) -> str:
            return " ".join(rng.choice(words, size=count, p=share / share.sum()))

        rows = []
        for _ in range(ROWS):
            count = int(np.clip(rng.lognormal(5.2, 0.7), 24, MAX_WORDS))
            asked = max(8, int(count * rng.uniform(0.2, 0.5)))
            rows.append({"prompt": text(asked), "completion": text(count - asked)})
        (self.folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=VOCAB, special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"], show_progress=False,
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        )  # fmt: skip
        tokenizer.train_from_iterator((row["completion"] for row in rows), trainer)
        fast = PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>", bos_token=None
        )
        fast.chat_template = CHATML
        fast.save_pretrained(self.base)

    def _write_model(self) -> None:
        config = LlamaConfig(
            **self.size.llama, max_position_embeddings=16384, tie_word_embeddings=False, bos_token_id=0, eos_token_id=2
        )
        write_checkpoint(self.base, config, num_files=4)
        torch.manual_seed(0)
        model = LlamaForCausalLM.from_pretrained(self.base, dtype=torch.bfloat16)
        lora = LoraConfig(
            r=RANK, lora_alpha=2 * RANK, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM"
        )
        get_peft_model(model, lora).save_pretrained(self.adapter)
