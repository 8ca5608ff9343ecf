"""Section 8 of the design: every trap seen in existing tools, and the tests (file: names) that hold
it shut."""

import ast
from pathlib import Path

import pytest

LOSSES, LOGITS, TRAIN, HEAD, ERRORS, TEMPLATE = (
    f"test_{name}.py" for name in ("losses", "logits", "train", "head", "errors", "template")
)
TRAPS = {
    1: (
        LOSSES,
        "test_trap_1_a_renormalised_top_k_is_blind_to_student_mass_outside_it_and_ours_is_not",
    ),
    2: (LOSSES, "test_trap_2_without_the_tail_term_kl_falls_below_zero_and_ours_does_not"),
    3: (LOSSES, "test_trap_3_the_tail_is_not_one_tempered_token"),
    4: (
        LOSSES,
        "test_trap_4_a_confident_teacher_and_a_confident_student_give_no_nan",
        "test_trap_4_a_bucket_that_underflows_gives_a_finite_gradient",
        "test_trap_4_the_bucket_of_a_confident_student_is_summed_and_not_one_minus_the_rest",
    ),
    5: (
        LOSSES,
        "test_trap_5_the_square_of_the_temperature_is_in_the_gradient",
        "test_gradient_agrees_with_finite_differences_through_softcap_scale_and_bias",
    ),
    6: (LOSSES, "test_trap_6_the_temperature_is_used"),
    7: (LOSSES, "test_trap_7_no_mean_over_the_vocabulary"),
    8: (
        TRAIN,
        "test_trap_8_the_gradient_does_not_depend_on_how_the_step_is_cut_and_packed",
        "test_trap_8_two_ranks_of_two_micro_batches_of_two_rows_sum_to_one_gradient",
        "test_trap_8_a_script_logs_the_same_loss_and_gradient_however_the_step_is_cut",
    ),
    9: (TRAIN, "test_trap_9_the_logged_loss_is_made_of_its_two_logged_parts_over_one_count"),
    # 10 to 14: the side of prepare_data.py, by the author of test_template.py (these names were
    # read from that file)
    10: (
        TEMPLATE,
        "test_trap10_targets_begin_right_after_what_chat_would_send",
        "test_trap10_the_end_of_turn_is_a_target_and_the_line_break_after_it_is_not",
    ),
    11: (TEMPLATE, "test_trap11_with_pad_equal_to_eos_every_end_of_turn_is_still_a_target"),
    12: (
        TEMPLATE,
        "test_trap12_a_template_without_generation_marks_has_targets_in_every_turn",
        "test_trap12_a_row_whose_prefixes_never_hold_has_no_target_and_says_so",
    ),
    13: (TEMPLATE, "test_trap13_a_template_with_bos_and_a_tokenizer_that_adds_bos_give_one"),
    14: (TEMPLATE, "test_trap14_a_think_block_that_the_generation_prompt_supplies_is_no_target"),
    15: (TRAIN, "test_trap_15_packed_rows_have_the_hidden_states_of_rows_alone"),
    16: (
        LOSSES,
        "test_trap_16_rows_above_the_common_vocabulary_are_cut_before_softmax_and_get_no_gradient",
    ),
    17: (ERRORS, "test_trap_17_a_tokenizer_of_the_same_size_with_other_words"),
    18: (
        LOSSES,
        "test_trap_18_logits_and_sums_are_float32_under_half_precision",
        "test_trap_18_a_flat_tail_of_1e_8_a_token_has_its_whole_gradient_in_float32",
    ),
    19: (
        TRAIN,
        "test_trap_19_training_calls_the_body_alone_and_keeps_no_other_layers_hidden_states",
    ),
    20: (LOSSES, "test_trap_20_softcap_and_scale_are_honoured"),
    21: (TRAIN, "test_trap_21_a_run_that_was_stopped_goes_on_with_the_rows_that_were_next"),
    22: (
        LOGITS,
        "test_trap_22_records_follow_target_numbers_whatever_order_and_packing_the_rows_come_in",
    ),
    23: (LOSSES, "test_trap_23_a_batch_without_targets_has_loss_zero_and_backward_works"),
    24: (LOGITS, "test_trap_24_a_teacher_with_dropout_is_dumped_without_it"),
    25: (
        TRAIN,
        "test_trap_25_a_teacher_that_cannot_be_read_ends_the_run_instead_of_leaving_cross_entropy",
        "test_trap_25_a_divergence_that_is_not_finite_ends_the_run_and_names_step_and_rows",
    ),
    26: (TRAIN, "test_trap_26_the_logged_loss_is_the_raw_loss_of_the_steps_own_rows"),
}
BOTH_SIDES = {
    10: (
        TRAIN,
        "test_trap_10_position_t_minus_1_predicts_token_t_in_a_packed_line",
        "test_trap_10_position_t_minus_1_predicts_token_t_in_padded_lines",
        "test_trap_10_a_model_that_knows_each_next_token_measures_a_cross_entropy_of_zero",
    ),
    15: (HEAD, "test_trap_15_rows_that_would_see_each_other_are_not_packed"),
    16: (
        LOGITS,
        "test_trap_16_a_padded_teacher_is_cut_to_the_students_tokens_before_softmax_and_top_k",
    ),
    17: (LOGITS, "test_trap_17_logits_of_another_vocabulary_of_the_same_size_are_refused"),
    20: (HEAD, "test_trap_20_the_probe_refuses_a_head_that_forgets_softcap_scale_or_bias"),
}


def test_every_trap_of_the_design_is_in_the_table():
    assert list(TRAPS) == list(range(1, 27))


@pytest.mark.parametrize(
    "trap, file, names",
    [
        (trap, file, names)
        for table in (TRAPS, BOTH_SIDES)
        for trap, (file, *names) in table.items()
    ],
)
def test_the_tests_of_a_trap_exist(trap, file, names):
    there = {
        node.name
        for node in ast.parse(next(Path(__file__).parents[1].glob(f"*/{file}")).read_text()).body
        if isinstance(node, ast.FunctionDef)
    }
    assert names and set(names) <= there, set(names) - there
