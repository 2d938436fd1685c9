"""What `make test` runs of those tests that would take most of its time; `make test-ci` runs the rest of them.

A quick run has a cell or two of each, of those that differ most, or none where another test comes close enough.
"""

from __future__ import annotations

from collections.abc import Iterable

# Test -> the ids that are kept.
KEPT: dict[str, frozenset[str]] = {
    f"tests/{test}": frozenset(ids)
    for test, ids in {
        "dist/test_batches.py::test_evaluation_in_mid_training_changes_nothing": ["ddp-lora", "fsdp2-full", "zero3-qlora"],
        "dist/test_collectives.py::test_gradients_travel_when_and_as_they_should": [
            "ddp-bf16-bf16-bf16", "fsdp2-bf16-fp32-fp32", "zero1-bf16-fp32-fp32", "zero2-fp32-fp32-bf16",
            "zero3-bf16-fp32-bf16",
        ],
        "dist/test_collectives_plan.py::test_shared_sequences_are_exchanged": ["ddp-none", "fsdp2-full"],
        "dist/test_compiled.py::test_resumed_equals_uninterrupted": [],
        "dist/test_compiled.py::test_the_losses_of_a_run_without_it": ["zero3-qlora"],
        "dist/test_elastic.py::test_no_rank_gathers": ["fsdp2"],
        "dist/test_evaluations.py::test_one_process_and_three_say_the_same": [],
        "dist/test_evaluations.py::test_questions_alone_change_no_step": [],
        "dist/test_evaluations.py::test_what_was_learned_by_heart_is_answered_and_scored": ["ddp-1"],
        "dist/test_fake_world.py::test_70b_over_eight": [],
        "dist/test_guard.py::test_waiting_for_the_loss_changes_nothing": [],
        "dist/test_lora.py::test_adapters_in_bf16_stay_near_one_process": ["fsdp2-lora"],
        "dist/test_methods.py::test_lora_plus": ["zero1"],
        "dist/test_methods.py::test_variants_equal_one_process": [
            "dora-fsdp2-3", "qdora-zero3-3", "pissa-fsdp2-2", "loftq-zero2-2", "whole-zero1-2", "frozen-zero3-2",
            "skip-zero1-2",
        ],
        "dist/test_noise.py::test_the_losses_of_one_process_on_three": ["fsdp2-full"],
        "dist/test_offload.py::test_in_bf16_too": ["zero2"],
        "dist/test_offload.py::test_the_same_losses_as_ddp": ["zero1-full", "zero2-lora", "zero3-full"],
        "dist/test_parity.py::test_three_processes_equal_one": ["fsdp2-qlora", "zero3-lora"],
        "dist/test_parity.py::test_selective_and_offloaded_checkpoints_change_nothing": ["ddp-lora", "fsdp2-full"],
        "dist/test_plan_memory.py::test_the_highest_moment": [
            "1-bf16-ddp-full-full-1", "1-bf16-ddp-full-full-3", "2-bf16-ddp-lora-none-1", "2-bf16-fsdp2-full-selective-1",
        ],
        "dist/test_plan_memory.py::test_the_highest_moment_with_blocks_that_stay_gathered": ["full"],
        "dist/test_plan_memory.py::test_zero_is_bounded": ["2-zero2-full-1", "2-zero3-full-1"],
        "dist/test_pool.py::test_processes_end_with_the_one_that_started_them": [],
        "dist/test_rehearsal.py::test_a_rehearsed_run_is_the_run": ["ddp-full-3", "fsdp2-lora-2"],
        "dist/test_resume.py::test_another_strategy_or_world_goes_on_with_it": [
            "full: zero3x2 -> zero3x3", "lora: zero1x3 -> fsdp2x2 -> zero2x2", "qlora: zero3x2 -> fsdp2x3",
        ],
        "dist/test_resume.py::test_momentum_of_sgd_is_part_of_it": ["fsdp2"],
        "dist/test_resume.py::test_resumed_equals_uninterrupted": [
            "ddp-full", "fsdp2-lora", "zero1-qlora", "zero2-full", "zero3-lora", "zero3 offload-qlora",
        ],
        "dist/test_resume.py::test_training_goes_on_while_a_checkpoint_is_written": ["fsdp2", "zero1"],
        "dist/test_sequence_parallel.py::test_sharing_sequences_changes_nothing": [
            "ddp-lora-2-2-full", "fsdp2-full-2-2-full", "zero3-qlora-2-2-full",
        ],
        "dist/test_streaming.py::test_a_rank_takes_its_shard": ["zero3-lora"],
        "e2e/test_planted_faults.py::test_a_tracker_that_does_not_answer": [],
        "e2e/test_probe.py::test_a_dry_run_that_does_not_fit_ends_with_3": [],
        "launch/test_accelerate.py::test_processes_and_their_arguments": ["fsdp2"],
        "launch/test_deepspeed.py::test_a_signal_to_the_launcher_ends_every_process": [],
        "launch/test_every_script.py::test_a_failure_that_all_processes_share_is_told_once": ["torchrun.sh"],
        "launch/test_rank_log.py::test_a_terminal_stays_one": [],
        "launch/test_rank_log.py::test_the_copy_ends_with_the_rank_and_not_before": [],
        "launch/test_same_losses.py::test_the_same_losses": ["torchrun"],
        "launch/test_signals.py::test_ctrl_c_reaches_the_whole_group": [],
        "launch/test_torchrun.py::test_interrupt_ends_every_process": [],
        "unit/test_compiled.py::test_without_a_compiler": [],
        "unit/test_plan_command.py::test_every_recipe_is_planned_and_fits": [
            "13b_qlora_1xa100", "70b_full_8xh100_offload", "8b_full_2xa100", "gemma_7b_lora_1xa100_80",
        ],
        "unit/test_plan_command.py::test_time_and_memory_of_a_plan_of_70b": [],
        "unit/test_plan_data.py::test_the_true_number_of_tokens_is_in_nine_of_ten_intervals": ["sorted"],
        "unit/test_plan_disk.py::test_a_model_and_an_adapter_under_every_strategy": ["ddp", "zero3"],
        "unit/test_plan_search.py::test_it_finds_what_trying_everything_finds": [],
        "unit/test_plan_search.py::test_methods_are_searched_where_they_are_asked_for": [],
        "unit/test_prepare.py::test_killed_at_any_moment_it_goes_on": [],
        "unit/test_recipes.py::test_its_states_fit_the_gpus_that_it_names": [
            "70b_full_2x8xh100", "7b_qlora_1xa100_40", "gemma3_1b_full_1xa100_40", "qwen2.5_7b_lora_1xa100_80",
        ],
    }.items()
}  # fmt: skip


def is_left_to_ci(nodeid: str) -> bool:
    """Whether a test is one of these, and no cell of it that is kept."""
    test, _, cell = nodeid.partition("[")
    return test in KEPT and cell.removesuffix("]") not in KEPT[test]


def missing(nodeids: Iterable[str]) -> list[str]:
    """What is to be kept and is not there, of the tests of which something is: a name has changed."""
    there: dict[str, set[str]] = {}
    for nodeid in nodeids:
        test, _, cell = nodeid.partition("[")
        there.setdefault(test, set()).add(cell.removesuffix("]"))
    return [f"{test}[{cell}]" for test, cells in there.items() for cell in KEPT.get(test, frozenset()) - cells]
