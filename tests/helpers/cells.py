"""What a world of test processes runs: short trainings on synthetic rows, returning numbers and what each rank held."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import yaml

from sft_dist.config.schema import Config
from sft_dist.data.batch import MicroBatch
from sft_dist.data.loader import TrainingOrder, collate
from sft_dist.data.packing import Packs, pack_best_fit
from sft_dist.data.prepared import PreparedData
from sft_dist.data.tokenizer import load_tokenizer
from sft_dist.model.export import export, publish
from sft_dist.resolve import resolve
from sft_dist.run import Run
from sft_dist.runtime.world import WorldShape
from sft_dist.sharding import registry
from sft_dist.sharding.optim import learning_rate
from sft_dist.sharding.strategy import Strategy
from sft_dist.sharding.verify import MovementCheck, verify_sharding
from sft_dist.train.step import evaluate, train_step

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Trained:
    """One rank's view of a short training."""

    losses: list[float]
    grad_norms: list[float]
    eval_losses: list[float]
    local: dict[str, tuple[int, str, bool]]
    """name -> (local numel, dtype, requires_grad), measured on the sharded model"""
    optimizer_numel: int
    weights: dict[str, np.ndarray[Any, Any]]
    """trainable parameters, gathered, after the last step; on rank 0 only"""


METHODS: dict[str, dict[str, Any]] = {
    "full": {"type": "full"},
    "lora": {"type": "lora", "r": 4, "alpha": 16},
    "qlora": {"type": "qlora", "r": 4, "alpha": 16},
    # Five is divided by neither 2 nor 3: shards are uneven.
    "prompt": {"type": "prompt", "num_virtual_tokens": 5},
    "prompt text": {"type": "prompt", "num_virtual_tokens": 5, "init_text": "Say: "},
    "p_tuning": {"type": "p_tuning", "num_virtual_tokens": 5, "encoder_hidden_size": 24},
    "p_tuning lstm": {"type": "p_tuning", "num_virtual_tokens": 5, "encoder": "lstm", "encoder_hidden_size": 24},
    "prefix": {"type": "prefix", "num_virtual_tokens": 5},
    "prefix projection": {"type": "prefix", "num_virtual_tokens": 5, "projection": True, "encoder_hidden_size": 24},
}


def config(
    model: str, /, method: str | dict[str, Any] = "full", strategy: str = "ddp", **sections: dict[str, Any]
) -> Config:
    """A config for tests in fp32; ``sections`` are merged over it.

    Args:
        method: a key of ``METHODS``, or a section whose other keys are those of the method of its type there.
    """
    method = METHODS[method] if isinstance(method, str) else METHODS[method["type"]] | method
    packing = "none" if "num_virtual_tokens" in method else "best_fit"
    base: dict[str, Any] = {
        "model": {"path": model},
        "method": method,
        "data": {"train": [{"path": "unused"}], "max_seq_len": 48, "packing": packing},
        "sharding": {"strategy": strategy},
        "precision": {"compute": "fp32"},
        "activation_checkpointing": {"mode": "full"},
        "optim": {"lr": 3e-3, "max_grad_norm": 0.5, "weight_decay": 0.1, "warmup_ratio": 0.2},
        "train": {"global_batch_size": 7, "micro_batch_size": 2, "max_steps": 6, "seed": 3},
        "output_dir": "unused",
    }
    for name, section in sections.items():
        # Another type has other keys: it replaces the section.
        base[name] = section if "type" in section else {**base.get(name, {}), **section}
    return Config.model_validate(base)


def synthetic_data(
    *, rows: int = 40, seed: int = 5, max_len: int = 30, capacity: int = 48, packing: bool = True, vocab: int = 259
) -> PreparedData:
    """Rows of a learnable pattern with uneven masks: some rows train one token, some nearly all."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(3, max_len, rows)
    ids = [(rng.integers(3, vocab) + rng.integers(1, 4) * np.arange(n)) % (vocab - 3) + 3 for n in lengths]
    masks = [np.arange(n) >= rng.integers(1, n) for n in lengths]
    packs = pack_best_fit(lengths, capacity) if packing else Packs.single(rows)
    return PreparedData.of(list(zip(ids, masks, strict=True)), packs)


def start(cfg: Config) -> tuple[Run, Strategy]:
    run = resolve(cfg, WorldShape(1, dist.get_world_size()))
    strategy = registry.apply(run, CPU)
    verify_sharding(strategy, registry.describe(run, dist.get_rank()))
    return run, strategy


def start_and_step(cfg: Config) -> tuple[Run, Strategy]:
    """A strategy after one step, still as described."""
    run, strategy = start(cfg)
    data = synthetic_data()
    step = TrainingOrder(data, run.batch, run.seed).step(0)
    train_step(strategy, data, run.batch, step, rank=dist.get_rank(), device=CPU, lr=3e-3)
    verify_sharding(strategy, registry.describe(run, dist.get_rank()))
    return run, strategy


def train(
    cfg_yaml: str, data_kwargs: dict[str, Any] | None = None, evaluate_every: int = 0, eval_rows: int = 7
) -> Trained:
    """The loop's own step function, over synthetic data."""
    run, strategy = start(Config.model_validate(yaml.safe_load(cfg_yaml)))
    rank = dist.get_rank()
    data = synthetic_data(**{"packing": run.data.packing != "none", **(data_kwargs or {})})
    held_out = synthetic_data(rows=eval_rows, seed=99, packing=False)
    order = TrainingOrder(data, run.batch, run.seed)
    assert run.max_steps is not None
    losses, norms, eval_losses = [], [], []
    check: MovementCheck | None = MovementCheck(strategy)
    try:
        for number in range(run.max_steps):
            if evaluate_every and number % evaluate_every == 0:
                eval_losses.append(evaluate(strategy, held_out, run.batch, rank=rank, device=CPU).loss)
            out = train_step(
                strategy, data, run.batch, order.step(number),
                rank=rank, device=CPU, lr=learning_rate(run.optim, number, run.max_steps),
            )  # fmt: skip
            losses.append(float(out.loss))
            norms.append(float(out.grad_norm))
            if check is not None:
                check.verify(rank)
                check = None
        weights = {n: t.float().numpy().copy() for n, t in strategy.full_parameters(trainable_only=True)}
        return Trained(
            losses, norms, eval_losses,
            {n: (t.numel(), str(t.dtype).removeprefix("torch."), r) for n, t, r in strategy.local_parameters()},
            sum(m.numel() for m in strategy.master_weights()),
            weights if rank == 0 else {},
        )  # fmt: skip
    finally:
        strategy.close()


def train_and_export(cfg_yaml: str, folder: str) -> list[np.ndarray[Any, Any]]:
    """Trains three steps, exports to ``folder`` and returns the logits [t, V] of each of ``probe_rows`` in memory."""
    run, strategy = start(Config.model_validate(yaml.safe_load(cfg_yaml)))
    rank = dist.get_rank()
    data = synthetic_data(packing=run.data.packing != "none")
    order = TrainingOrder(data, run.batch, run.seed)
    try:
        for number in range(3):
            train_step(strategy, data, run.batch, order.step(number), rank=rank, device=CPU, lr=3e-3)
        logits = all_logits(strategy, collate(data, list(PROBE_ROWS)))
        everything = run.model.method.type == "full"
        export(
            Path(folder), run.model, strategy.model, strategy.full_parameters(trainable_only=not everything),
            load_tokenizer(run.model.path, added=run.model.tokens.added), is_main=rank == 0, seed=run.seed,
        )  # fmt: skip
        if rank == 0:
            publish(Path(folder))
        return [part.numpy() for part in logits.split([len(data.row(row)[0]) for row in PROBE_ROWS])]
    finally:
        strategy.close()


PROBE_ROWS = (0, 3, 4)


def probe_ids() -> list[list[int]]:
    """Token ids of the rows whose logits ``train_and_export`` returns."""
    data = synthetic_data()
    return [data.row(row)[0].tolist() for row in PROBE_ROWS]


def all_logits(strategy: Strategy, batch: MicroBatch) -> torch.Tensor:
    """All logits [T, V] of a batch."""
    everywhere = torch.arange(batch.num_tokens)
    return strategy.infer(replace(batch, supervised_index=everywhere), logits=True)


def whole_run(cfg: Config, folder: Path) -> Config:
    """The same for ``train`` of ``train/run.py``: in ``folder``, without W&B and the fresh process at the end."""
    quick = {"logging": {"wandb": {"mode": "disabled"}}, "output_dir": str(folder)}
    settings = cfg.model_dump(mode="json") | quick
    settings["checkpoint"]["prove_final"] = False
    return Config.model_validate(settings)


_stores = itertools.count()


def store() -> dist.Store:
    """The store of a run of its own: every rank has run equally many cells."""
    return dist.PrefixStore(f"run {next(_stores)}", dist.distributed_c10d._get_default_store())


def dump(cfg: Config) -> str:
    """A config as text, which travels to the workers."""
    return yaml.safe_dump(cfg.model_dump(mode="json"))
