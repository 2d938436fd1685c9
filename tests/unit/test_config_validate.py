"""Keys that contradict each other, and those that only look as if they did."""

from __future__ import annotations

from typing import Any

import pytest

from sft_dist.config.schema import Config
from sft_dist.config.validate import validate
from sft_dist.errors import ConfigError


def config(**sections: Any) -> Config:
    smallest: dict[str, Any] = {
        "model": {"path": "m"},
        "data": {"train": [{"path": "a.jsonl"}]},
        "train": {"global_batch_size": 4, "max_steps": 10},
        "output_dir": "runs/x",
    }
    return Config.model_validate(smallest | sections)


def train(**keys: Any) -> dict[str, Any]:
    return {"train": {"global_batch_size": 4} | keys}


LORA = {"type": "lora"}
UNPACKED = {"data": {"train": [{"path": "a.jsonl"}], "packing": "none"}}

HELD_OUT = {"data": {"train": [{"path": "a.jsonl"}], "eval": [{"path": "b.jsonl"}]}}

CUSTOM = {"scores": {"metrics": ["chrf", "custom"], "custom": "own.py:judge"}}

WRONG = [
    (
        HELD_OUT | {"early_stopping": {}},
        "early_stopping is set, but eval.every_steps is not: the only evaluation of training is at its end",
        "set eval.every_steps, or remove early_stopping",
    ),
    (
        HELD_OUT | {"early_stopping": {"metric": "eval_scores/custom"}, "eval": {"every_steps": 5} | CUSTOM},
        "early_stopping.metric is eval_scores/custom, whose name does not say whether lower or higher is better",
        "set early_stopping.mode to min or max",
    ),
    (
        HELD_OUT | {"early_stopping": {"metric": "eval_length"}, "eval": {"every_steps": 5}},
        "early_stopping.metric is eval_length, which an evaluation of this run does not measure",
        "set early_stopping.metric to one of: eval_loss, eval_perplexity",
    ),
    (
        HELD_OUT
        | {"checkpoint": {"keep_best": True, "best_metric": "eval_scores/rougeL"}}
        | {"eval": {"scores": {"metrics": ["chrf"]}, "long_texts": {"paths": ["a.txt"]}}},
        "checkpoint.best_metric is eval_scores/rougeL, which an evaluation of this run does not measure",
        "set checkpoint.best_metric to one of: eval_loss, eval_perplexity, eval_scores/chrf, eval_long_loss, "
        "eval_long_perplexity, or add rougeL to eval.scores.metrics",
    ),
    (
        HELD_OUT
        | {"early_stopping": {"metric": "eval_scores/chrf"}}
        | {"eval": {"every_steps": 5, "scores": {}, "answers": {"when": "ends"}}},
        "early_stopping.metric is eval_scores/chrf, but with eval.answers.when ends most evaluations have no answers",
        "set eval.answers.when to always, or early_stopping.metric to eval_loss",
    ),
    (
        HELD_OUT | {"checkpoint": {"keep_best": True, "best_mode": "max"}},
        "checkpoint.best_mode is max, but eval_loss is better the other way",
        "remove checkpoint.best_mode",
    ),
    (
        HELD_OUT | {"checkpoint": {"best_metric": "eval_perplexity"}},
        "checkpoint.best_metric is eval_perplexity, which has no effect: no best checkpoint is kept",
        "set checkpoint.keep_best to true, or checkpoint.final to best, or remove checkpoint.best_metric",
    ),
    (
        HELD_OUT
        | {"early_stopping": {"metric": "eval_scores/custom", "mode": "max"}, "eval": {"every_steps": 5} | CUSTOM}
        | {"checkpoint": {"best_mode": "min"}},
        "checkpoint.best_mode is min, but early_stopping waits for eval_scores/custom the other way",
        "remove checkpoint.best_mode, or set checkpoint.best_metric",
    ),
    (
        {"checkpoint": {"final": "best"}},
        "checkpoint.final is best, but there is nothing to evaluate: data.eval is empty",
        "add data.eval, or set checkpoint.final to last",
    ),
    (
        {"optim": {"no_decay": ["lm_head"]}},
        "optim.no_decay is ['lm_head'], which has no effect with optim.weight_decay 0",
        "remove optim.no_decay, or set optim.weight_decay",
    ),
    (
        {"cluster": {"request_gpus": "none", "gpu_type": "h100"}},
        "cluster.gpu_type is h100, which has no effect with cluster.request_gpus none",
        "remove cluster.gpu_type, or set cluster.request_gpus to gpus-per-node or gres",
    ),
    (
        {"cluster": {"request_gpus": "none", "then": {"command": "export {run}", "gpus": 1}}},
        "cluster.then.gpus is 1, which has no effect with cluster.request_gpus none",
        "remove cluster.then.gpus, or set cluster.request_gpus to gpus-per-node or gres",
    ),
    (
        {"cluster": {"time_limit": "60", "time_margin": 2.0}},
        "cluster.time_margin is 2, which has no effect with cluster.time_limit",
        "remove one of them",
    ),
    (
        {"cluster": {"options": ["--nodes=4"]}},
        "cluster.options has --nodes=4, which the script says itself",
        "remove it, and set hardware.nodes",
    ),
    (
        {"cluster": {"options": ["-t60"]}},
        "cluster.options has -t60, which the script says itself",
        "remove it, and set cluster.time_limit",
    ),
    (
        {"cluster": {"options": ["--signal B:USR1@60"]}},
        "cluster.options has --signal B:USR1@60, which the script says itself",
        "remove it, and set cluster.signal_before_s",
    ),
    (
        {"cluster": {"options": ["--array=1-3"]}},
        "cluster.options has --array=1-3, with which the job would not work",
        "remove it",
    ),
    (
        {"cluster": {"options": ["nice=100"]}},
        "cluster.options has 'nice=100', which is no option of sbatch",
        "write the option and its value as one entry, e.g. --nice=100",
    ),
    (
        {"cluster": {"environment": {"NCCL-DEBUG": "INFO"}}},
        "cluster.environment has 'NCCL-DEBUG', which is no name of a variable",
        "correct it",
    ),
    (
        {"cluster": {"environment": {"PYTHONPATH": "/x"}}},
        "cluster.environment has PYTHONPATH, which the job sets itself",
        "remove PYTHONPATH",
    ),
    (
        {"cluster": {"container": {"runtime": "pyxis", "image": "a", "mounts": ["/data"]}}},
        "cluster.container.mounts.0 is '/data'",
        "write SOURCE:TARGET, e.g. /scratch/data:/data; TARGET begins with /",
    ),
    (
        {"cluster": {"exclude": ["n1", " "]}},
        "cluster.exclude.1 is empty",
        "set cluster.exclude.1, or remove it",
    ),
    (
        {"cluster": {"account": "lab\n#SBATCH --nodes=9"}},
        "cluster.account is more than one line",
        "write cluster.account in one line",
    ),
    (
        train(),
        "the length of the run is missing",
        "set train.num_epochs or train.max_steps",
    ),
    (
        train(num_epochs=1, max_steps=2),
        "train.num_epochs is 1 and train.max_steps is 2: both set the length of the run",
        "remove one of them (as an override: train.num_epochs=null or train.max_steps=null)",
    ),
    (
        train(num_epochs=1, micro_batch_size=8),
        "train.micro_batch_size is 8, more than train.global_batch_size, which is 4",
        "set train.micro_batch_size to at most 4",
    ),
    (
        {"model": {"path": "m", "add_tokens": ["<a>", "<b>", "<a>"]}},
        "model.add_tokens has <a> twice",
        "name each token of model.add_tokens once",
    ),
    (
        {"method": LORA | {"train_tokens": ["<a>", " "]}},
        "method.train_tokens is ['<a>', ' ']: one token is empty",
        "remove the empty token from method.train_tokens",
    ),
    (
        {"optim": {"type": "sgd", "warmup_ratio": 0.95}},
        "optim.warmup_ratio 0.95 of train.max_steps 10 is all of them: lr would never leave the warm-up",
        "set optim.warmup_ratio to at most 0.9, or train longer",
    ),
    (
        {"precision": {"compute": "fp32", "master": "bf16"}},
        "precision.master bf16 stores the weights more coarsely than precision.compute fp32 multiplies them",
        "set precision.master to fp32, or precision.compute to bf16",
    ),
    (
        {"precision": {"master": "bf16"}, "sharding": {"strategy": "zero2"}},
        "precision.master is bf16, but sharding.strategy zero2 (DeepSpeed) always keeps fp32 master weights",
        "set precision.master to fp32, or sharding.strategy to fsdp2 or ddp",
    ),
    (
        {"precision": {"reduce": "bf16"}, "sharding": {"strategy": "fsdp2", "reduce_once_a_step": True}},
        "sharding.reduce_once_a_step adds up micro-batches in the dtype of precision.reduce, which is bf16",
        "set precision.reduce to fp32, or sharding.reduce_once_a_step to false",
    ),
    (
        {"activation_checkpointing": {"mode": "every_k"}},
        "activation_checkpointing.mode is every_k, but activation_checkpointing.k is missing",
        "set activation_checkpointing.k, e.g. to 2",
    ),
    (
        {"activation_checkpointing": {"mode": "full", "k": 2}},
        "activation_checkpointing.k is 2, which has no effect with activation_checkpointing.mode full",
        "remove activation_checkpointing.k, or set activation_checkpointing.mode to every_k",
    ),
    (
        {"activation_checkpointing": {"mode": "none", "offload": True}},
        "activation_checkpointing.offload is true, but with activation_checkpointing.mode none no layer is recomputed",
        "set activation_checkpointing.mode to full, selective or every_k, or offload to false",
    ),
    (
        {"activation_checkpointing": {"offload": True}},
        "activation_checkpointing.offload is true, but with activation_checkpointing.mode auto there may be no layer that "
        "is recomputed",
        "set activation_checkpointing.mode to full, selective or every_k, or offload to false",
    ),
    (
        {"optim": {"type": "sgd"}, "precision": {"optimizer_state": "8bit"}},
        "precision.optimizer_state 8bit has no effect with optim.type sgd: only AdamW reads it",
        "remove precision.optimizer_state, or set optim.type to adamw",
    ),
    (
        {"optim": {"paged": True}, "precision": {"master": "bf16"}},
        "optim.paged is true, but bitsandbytes, which pages the moments, has no bf16 ones",
        "set precision.optimizer_state to 8bit or fp32, or optim.paged to false",
    ),
    (
        {"optim": {"paged": True}, "sharding": {"strategy": "fsdp2", "cpu_offload": True}},
        "optim.paged is true, but sharding.cpu_offload keeps the moments in host memory already",
        "set optim.paged or sharding.cpu_offload to false",
    ),
    (
        {"method": LORA | {"target_modules": []}},
        "method.target_modules is []: an adapter on nothing",
        "set method.target_modules to all-linear or to names of layers, e.g. [q_proj, v_proj]",
    ),
    (
        {"method": {"type": "qlora", "target_modules": ["q_proj", " "]}},
        "method.target_modules is ['q_proj', ' ']: one name is empty",
        "remove the empty name from method.target_modules",
    ),
    (
        {"data": UNPACKED["data"] | {"packing_window": 10}},
        "data.packing_window is 10, which has no effect with data.packing none",
        "remove data.packing_window, or set data.packing to best_fit",
    ),
    (
        {"method": {"type": "prefix", "num_virtual_tokens": 8}},
        "data.packing is best_fit, but method.type prefix puts 8 virtual tokens in front of every row: a pack would "
        "exceed data.max_seq_len by as many for each row in it",
        "set data.packing to none",
    ),
    (
        UNPACKED | {"method": {"type": "prompt", "init_text": " "}},
        "method.init_text is empty",
        "remove method.init_text, or give a text to start from",
    ),
    (
        UNPACKED | {"method": {"type": "p_tuning", "encoder_num_layers": 3}},
        "method.encoder_num_layers is 3, which has no effect with method.encoder mlp",
        "remove method.encoder_num_layers, or set method.encoder to lstm",
    ),
    (
        UNPACKED | {"method": {"type": "prefix", "encoder_hidden_size": 64}},
        "method.encoder_hidden_size is 64, which has no effect without projection",
        "remove method.encoder_hidden_size, or set method.projection to true",
    ),
    (
        {"optim": {"lora_plus_ratio": 4}},
        "optim.lora_plus_ratio is 4.0, but method.type full has no B",
        "remove optim.lora_plus_ratio, or set method.type to lora or qlora",
    ),
    (
        {"method": {"type": "qlora", "quantization": {"skip": ["q_proj"], "skip_budget": 0.2}}},
        "method.quantization.skip_budget is 0.2, which only method.quantization.skip auto looks at",
        "remove method.quantization.skip_budget, or set method.quantization.skip to auto",
    ),
    (
        {"method": {"type": "qlora", "quantization": {"skip_budget": 0.2}}},
        "method.quantization.skip_budget is 0.2, which only method.quantization.skip auto looks at",
        "remove method.quantization.skip_budget, or set method.quantization.skip to auto",
    ),
    (
        {"method": {"type": "qlora", "quantization": {"skip": [""]}}},
        "method.quantization.skip is ['']: one name is empty",
        "remove the empty name from method.quantization.skip",
    ),
    (
        {"method": {"type": "full", "freeze": ["embed", " "]}},
        "method.freeze is ['embed', ' ']: one name is empty",
        "remove the empty name from method.freeze",
    ),
    (
        {"method": LORA | {"modules_to_save": [""]}},
        "method.modules_to_save is ['']: one name is empty",
        "remove the empty name from method.modules_to_save",
    ),
    (
        {"method": LORA | {"target_modules": ["re:layers.(0"]}},
        "method.target_modules: re:layers.(0 is no regular expression (missing ), unterminated subpattern at position 7)",
        "correct it in method.target_modules",
    ),
    (
        {"method": LORA | {"init": "pissa", "init_from": "a/final"}},
        "method.init is pissa and method.init_from is a/final: both say how the adapter starts",
        "remove one of them",
    ),
    (
        {"method": {"type": "qlora", "init": "pissa"}},
        "method.init pissa freezes what is left of the weight, and a quantised rest is no longer the base with "
        "method.type qlora",
        "set method.type to lora, or method.init to loftq",
    ),
    (
        {"method": LORA | {"init": "loftq"}},
        "method.init loftq starts from the error of quantisation, and nothing is quantised with method.type lora",
        "set method.type to qlora, or method.init to default or pissa",
    ),
    (
        {"method": LORA | {"init": "pissa", "dora": True}},
        "method.init pissa is saved as an adapter of twice the rank, which method.dora does not allow",
        "set method.dora to false, or method.init to default",
    ),
    (
        {"eval": {"every_steps": 5}},
        "eval.every_steps is 5, but data.eval is empty",
        "add held-out sources to data.eval, set data.eval_split, or remove eval.every_steps",
    ),
    (
        {"eval": {"samples": {"prompts": ["x"]}}},
        "eval.samples is set, but there is no evaluation: data.eval is empty",
        "add held-out sources to data.eval, set data.eval_split, or remove eval.samples",
    ),
    (
        {"data": {"train": [{"path": "a"}], "eval": [{"path": "b"}]}, "eval": {"samples": {}}},
        "eval.samples has no prompt",
        "set eval.samples.prompts, eval.samples.file or eval.samples.from_eval, or remove eval.samples",
    ),
    (
        {
            "data": {"train": [{"path": "a"}], "eval": [{"path": "b"}]},
            "eval": {"samples": {"from_eval": 1, "system": "x"}},
        },
        "eval.samples.system has no effect on rows of data.eval, which have their own",
        "remove eval.samples.system, or set eval.samples.prompts",
    ),
    (
        {"eval": {"answers": {"max_new_tokens": 5}}},
        "eval.answers has no effect: nothing is answered",
        "set eval.scores or eval.samples, or remove eval.answers",
    ),
    (
        {
            "data": {"train": [{"path": "a"}], "eval": [{"path": "b"}], "max_seq_len": 64},
            "eval": {"long_texts": {"paths": ["x.txt"], "stride": 64}},
        },
        "eval.long_texts.stride is 64, and the window has 64 tokens: some would have no context",
        "set eval.long_texts.stride to less than 64",
    ),
    ({"output_dir": " "}, "output_dir is empty", "set output_dir to a path"),
    ({"model": {"path": ""}}, "model.path is empty", "set model.path to a path"),
    (
        {"data": {"train": [{"path": "a"}], "eval": [{"path": " "}]}},
        "data.eval.0.path is empty",
        "set data.eval.0.path to a path",
    ),
    (
        {"data": {"train": [{"path": "a"}], "chat_template": ""}},
        "data.chat_template is empty",
        "set data.chat_template to a path",
    ),
    (
        {"data": {"train": [{"path": "a"}, {"path": ""}]}},
        "data.train.1.path is empty",
        "set data.train.1.path to a path",
    ),
    (
        {"hardware": {"price_per_hour": 2.5, "owned": {"price_per_kwh": 0.2}}},
        "hardware.price_per_hour and hardware.owned are set: each says what a GPU costs",
        "keep one of them",
    ),
    (
        {"hardware": {"price_per_hour_jpy": 400, "price_kind": "spot"}},
        "hardware.price_kind is spot, which has no effect with hardware.price_per_hour_jpy",
        "remove hardware.price_kind, or hardware.price_per_hour_jpy",
    ),
    (
        {"hardware": {"owned": {}}},
        "hardware.owned has no price of a kWh",
        "set hardware.owned.price_per_kwh or price_per_kwh_jpy",
    ),
    (
        {"hardware": {"owned": {"price_per_kwh": 0.2, "price_per_kwh_jpy": 30}}},
        "hardware.owned has the price of a kWh in USD and in JPY",
        "remove one of them",
    ),
    (
        {"hardware": {"nodes": 1, "network": "infiniband-ndr-x8"}},
        "hardware.network is infiniband-ndr-x8, which has no effect with hardware.nodes 1",
        "remove hardware.network, or set hardware.nodes",
    ),
    ({"hardware": {"gpu": " "}}, "hardware.gpu is empty", "set hardware.gpu to a name, or remove it"),
]

RIGHT = [
    HELD_OUT | {"early_stopping": {"metric": "eval_loss/en"}, "eval": {"every_steps": 5}},
    HELD_OUT | {"early_stopping": {"metric": "eval_scores/custom", "mode": "max"}, "eval": {"every_steps": 5} | CUSTOM},
    HELD_OUT
    | {"eval": {"scores": {}, "answers": {"when": "ends"}}}
    | {"checkpoint": {"final": "best", "best_metric": "eval_scores/chrf"}},
    HELD_OUT | {"early_stopping": {}, "eval": {"every_steps": 5}, "checkpoint": {"best_metric": "eval_perplexity"}},
    {"cluster": {"time_limit": "1-00:00:00", "time_margin": 1.5, "options": ["--nice=100 --mail-type=END", "-v"]}},
    {"cluster": {"container": {"runtime": "pyxis", "image": "a#b:1", "mounts": ["/my data:/data", "/x:/x:ro"]}}},
    {},
    train(num_epochs=1, micro_batch_size=4),
    train(num_epochs=1, micro_batch_size="auto"),
    {"precision": {"compute": "bf16", "master": "bf16"}},
    {"precision": {"reduce": "bf16"}, "sharding": {"strategy": "zero3"}},
    {"precision": {"compute": "fp32"}, "sharding": {"strategy": "zero1"}},
    {"activation_checkpointing": {"mode": "every_k", "k": 2, "offload": True}},
    {"activation_checkpointing": {"mode": "selective"}},
    {"optim": {"paged": True}, "precision": {"optimizer_state": "8bit"}},
    {"method": LORA | {"target_modules": ["q_proj"]}},
    {"method": LORA},
    {"method": LORA | {"init": "pissa"}, "optim": {"lora_plus_ratio": 4}},
    {"method": {"type": "qlora", "init": "loftq", "dora": True, "quantization": {"skip": "auto", "skip_budget": 0.2}}},
    {"method": LORA | {"target_modules": ["re:layers.(0|1)"]}},
    UNPACKED | {"method": {"type": "prompt"}},
    UNPACKED | {"method": {"type": "p_tuning", "encoder": "lstm", "encoder_num_layers": 3}},
    UNPACKED | {"method": {"type": "prefix", "projection": True, "encoder_hidden_size": 64}},
    {"eval": {"every_steps": 5}, "data": {"train": [{"path": "a"}], "eval": [{"path": "b"}]}},
    {"optim": {"warmup_ratio": 0.9}},
    train(max_steps=1),  # the default warm-up of one step; there is nothing after it to reach
    {"optim": {"type": "sgd"}, "sharding": {"strategy": "zero2"}},
    {"hardware": {"gpu": "h100", "gpus_per_node": 8, "nodes": 2, "network": "p5.48xlarge", "price_kind": "spot"}},
    {"hardware": {"owned": {"price_per_kwh_jpy": 30, "pue": 1.2}, "host_memory_gib": 2048, "fx": 150}},
]


@pytest.mark.parametrize(("sections", "what", "fix"), WRONG, ids=[what[:40] for _, what, _ in WRONG])
def test_contradiction(sections: dict[str, Any], what: str, fix: str) -> None:
    with pytest.raises(ConfigError) as caught:
        validate(config(**sections))
    assert (caught.value.what, caught.value.fix) == (what, fix)


@pytest.mark.parametrize("sections", RIGHT, ids=str)
def test_no_contradiction(sections: dict[str, Any]) -> None:
    validate(config(**sections))


@pytest.mark.parametrize("steps", range(2, 60))
def test_the_advised_warmup_is_accepted(steps: int) -> None:
    with pytest.raises(ConfigError) as caught:
        validate(config(**train(max_steps=steps), optim={"warmup_ratio": 0.99}))
    advised = float(caught.value.fix.removeprefix("set optim.warmup_ratio to at most ").split(",")[0])
    validate(config(**train(max_steps=steps), optim={"warmup_ratio": advised}))


def test_several_contradictions_come_at_once_and_name_the_file() -> None:
    with pytest.raises(ConfigError) as caught:
        validate(config(**train(), eval={"every_steps": 5}), source="run.yaml")
    assert caught.value.what.splitlines() == [
        "run.yaml: the length of the run is missing; set train.num_epochs or train.max_steps",
        "run.yaml: eval.every_steps is 5, but data.eval is empty; add held-out sources to data.eval, set "
        "data.eval_split, or remove eval.every_steps",
    ]
    assert caught.value.fix == "correct these 2 places"
