"""What a run tells before its first step: the numbers of the run that follows, and no others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from sft_dist.data.prepared import PreparedData
from sft_dist.resolve import resolve
from sft_dist.run import Run
from sft_dist.runtime.world import WorldShape
from sft_dist.sharding import registry
from sft_dist.train.summary import MAX_LAYERS_SHOWN, summary
from tests.helpers import cells


def run_of(base: Path, method: str | dict[str, Any], strategy: str = "fsdp2", size: int = 2, **sections: Any) -> Run:
    return resolve(cells.config(str(base), method, strategy, **sections), WorldShape(1, size))


def told(run: Run, data: PreparedData | None = None, held_out: PreparedData | None = None) -> dict[str, str]:
    """The lines by their first word."""
    spec = registry.describe(run, 0)
    lines = summary(run, spec, data or cells.synthetic_data(), held_out, num_steps=6).splitlines()
    return {line.split()[0]: line.partition(" ")[2].strip() for line in lines}


def test_what_is_quantised_and_what_is_not(tiny_base: Path) -> None:
    assert "linear layers" not in told(run_of(tiny_base, "lora"))["model"]
    assert told(run_of(tiny_base, "qlora"))["model"].endswith("; linear layers in nf4")
    few = run_of(tiny_base, {"type": "qlora", "quantization": {"type": "int8", "skip": ["q_proj"]}})
    names = "model.layers.0.self_attn.q_proj, model.layers.1.self_attn.q_proj"
    assert told(few)["model"].endswith(f"; linear layers in int8 but for 2 in fp32: {names}")
    precision = {"precision": {"compute": "bf16"}}
    many = run_of(tiny_base, {"type": "qlora", "quantization": {"skip": ["self_attn"]}}, **precision)
    line = told(many)["model"]
    assert "; linear layers in nf4 but for 8 in bf16: model.layers.0.self_attn.q_proj, " in line
    assert line.count("self_attn") == MAX_LAYERS_SHOWN
    assert line.endswith(", ...")


def test_a_best_state_by_another_metric_than_early_stopping(tiny_base: Path) -> None:
    stopping = {"metric": "eval_scores/chrf"}
    assert "best" not in told(run_of(tiny_base, "lora", early_stopping=stopping))
    other = run_of(tiny_base, "lora", early_stopping=stopping, checkpoint={"best_metric": "eval_loss"})
    assert told(other)["best"] == (
        "final/ and the checkpoint that is kept are by checkpoint.best_metric eval_loss; early stopping waits for "
        "eval_scores/chrf"
    )


def test_elements_and_tokens(tiny_base: Path) -> None:
    run = run_of(tiny_base, "lora", model={"add_tokens": ["<tool>", "<call>"]})
    stored = sum(p.numel for p in run.model.parameters)
    assert told(run)["model"] == (
        f"{tiny_base}: lora, {run.model.num_trainable:,} of {stored:,} parameters trained; 2 tokens added, 2 rows "
        "more in a vocabulary of now 261; rows of 2 tokens trained"
    )


@pytest.mark.parametrize(
    ("sections", "expected"),
    [
        ({}, "adamw with moments in fp32"),
        ({"precision": {"compute": "bf16", "optimizer_state": "8bit"}}, "adamw with moments in 8bit"),
        ({"precision": {"compute": "bf16", "master": "bf16"}}, "adamw with moments in bf16"),
        ({"optim": {"type": "adamw", "paged": True}}, "adamw with paged moments in fp32"),
        ({"optim": {"type": "adafactor"}}, "adafactor"),
    ],
)
def test_what_the_optimizer_keeps(tiny_base: Path, sections: dict[str, Any], expected: str) -> None:
    run = run_of(tiny_base, "full", **sections)
    stored = run.precision.stored(trainable=True, strategy="fsdp2")
    assert told(run)["precision"] == (
        f"compute {run.precision.compute}, trainable stored in {stored}, master {run.precision.master}, gradients "
        f"reduced in {run.precision.reduce}, {expected}"
    )


def test_what_decays_and_what_is_noise(tiny_base: Path) -> None:
    run = run_of(tiny_base, "full", optim={"no_decay": ["embed_tokens", "lm_head"]})
    matrices = sum(p.numel for p in run.model.parameters if len(p.shape) == 2)
    ends = sum(p.numel for p in run.model.parameters if "embed_tokens" in p.name or "lm_head" in p.name)
    assert told(run)["decay"] == (
        f"0.1 on {matrices - ends:,} of {run.model.num_trainable:,} trained parameters: not on norms and biases, nor on "
        "embed_tokens, lm_head"
    )
    assert "noise" not in told(run)
    assert "decay" not in told(run_of(tiny_base, "full", optim={"weight_decay": 0.0}))
    noisy = told(run_of(tiny_base, "full", train={"neftune_alpha": 5.0, "label_smoothing": 0.1}))["noise"]
    assert "noise on the embeddings (NEFTune, alpha 5) and labels smoothed by 0.1" in noisy


def test_where_it_is(tiny_base: Path) -> None:
    run = run_of(tiny_base, "full", sharding={"strategy": "fsdp2", "dp_replicate": 2, "cpu_offload": True}, size=4)
    spec = registry.describe(run, 0)
    assert told(run)["sharding"] == (
        f"fsdp2 on 4 ranks in 2 replicas, verified: rank 0 holds {spec.parameter_bytes / 2**20:,.1f} MiB of parameters "
        f"and {spec.optimizer_numel:,} optimizer elements, optimizer and parameters in host memory; activation "
        "checkpointing full"
    )


def test_how_often_gradients_are_reduced(tiny_base: Path) -> None:
    for once, said in ((False, "gradients reduced in fp32, "), (True, "gradients reduced in fp32 once a step, ")):
        run = run_of(tiny_base, "full", sharding={"strategy": "fsdp2", "reduce_once_a_step": once})
        assert said in told(run)["precision"]


def test_data_and_steps(tiny_base: Path) -> None:
    data, held_out = cells.synthetic_data(), cells.synthetic_data(rows=7, seed=99)
    lines = told(run_of(tiny_base, "full", "ddp", size=1), data, held_out)
    tokens, supervised = len(data.stores[0].input_ids), int(data.num_supervised.sum())
    assert lines["data"] == (
        f"40 rows in {data.num_sequences} packs, {tokens} tokens, {supervised} supervised ({supervised / tokens:.0%}); "
        "eval: 7 rows"
    )
    assert lines["schedule"] == "6 steps of 7 packs: 1 rank x 4 micro-batches of up to 2"
    shared = run_of(tiny_base, "full", sharding={"strategy": "fsdp2", "sequence_parallel": 2}, size=4)
    assert told(shared)["schedule"].startswith(
        "6 steps of 7 packs: 2 groups of 2 ranks that share sequences x 2 micro-"
    )
