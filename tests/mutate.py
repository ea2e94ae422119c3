"""One-line defects that the tests must catch: ``python tests/mutate.py``, run by ``make test``.

    python tests/mutate.py [FILE ...]        only those of these files, such as rules/feedback.py

Each mutant is a copy of the package with one defect, tested by the narrow test named beside it.
Exit status 1 if a mutant survives, if the tests fail without a defect, or if the text to be
changed no longer occurs exactly once in its file.
"""

from __future__ import annotations

import contextlib
import io
import multiprocessing
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

TESTS = Path(__file__).resolve().parent
PACKAGE = TESTS.parent / "bpfree"
PROCESSES = 2
# nbval takes seconds to import, and examples that fail need not be made smaller
OPTIONS = ["-x", "-p", "no:cacheprovider", "-p", "no:nbval", "--hypothesis-profile=mutants"]


class Mutant(NamedTuple):
    file: str  # in the package
    old: str  # occurs exactly once in the file
    new: str
    reason: str
    test: str  # file::test that must fail


MUTANTS = [
    # ---- the signal ----
    Mutant("rules/feedback.py", 'return state[f"B{l}"]',
           'return state[f"B{l}"].T.reshape(state[f"B{l}"].shape)', "transposed feedback",
           "test_feedback.py::test_signals_and_gradients_of_an_mlp_are_the_equations"),
    Mutant("rules/feedback.py", 'return state[f"B{l}"]', 'return getattr(self, f"B{l}")',
           "stale feedback: the rule's own, not the state's",
           "test_rule.py::test_update_reads_only_the_weights_and_feedback_it_is_given"),
    Mutant("rules/backprop.py", 'return params[f"{l - 1}.linear.weight"]',
           "return self.net[l - 1].linear.weight", "stale weights: the module's own",
           "test_rule.py::test_update_reads_only_the_weights_and_feedback_it_is_given"),
    Mutant("rules/backprop.py", "self.net[l - 1].local_vjp(v, t)", "v",
           "missing derivative in the chain",
           "test_feedback.py::test_signals_and_gradients_of_an_mlp_are_the_equations"),
    Mutant("rules/feedback.py", "block.local_vjp(v, t)", "v", "missing derivative of a broadcast",
           "test_feedback.py::test_signals_and_gradients_of_an_mlp_are_the_equations"),
    Mutant("rule.py", "dtype=target.dtype) - target", "dtype=target.dtype) * -1 + target",
           "wrong sign of the error",
           "test_measure.py::test_alignment_is_the_angle_and_the_ratio_of_the_weight_gradients"),
    Mutant("rules/feedback.py", "return target", "return error", "DRTP sends the error",
           "test_feedback.py::test_drtp_hidden_signals_do_not_know_the_error"),
    Mutant("rules/feedback.py", 'torch.sign(params[f"{l - 1}.linear.weight"])',
           'params[f"{l - 1}.linear.weight"]', "sign symmetry without sign",
           "test_equivalence.py::test_sign_symmetry_with_the_weights_magnitudes_is_backprop"),
    Mutant("rules/falsifiers.py", ".roll(1, 1)", "", "shuffled signals in their places",
           "test_feedback.py::"
           "test_shuffling_gives_each_sample_the_hidden_signal_of_another[mlp-fa]"),
    Mutant("block.py", "v = v * t.mask", "pass", "dropout mask forgotten in the local derivative",
           "test_feedback.py::test_signals_and_gradients_under_dropout_are_the_equations"),
    Mutant("block.py", "in_row = self._largest(t.z, -1)", "in_row = self._largest(t.a, -1)",
           "max-pooling routes by pre-activations",
           "test_network.py::test_local_vjp_is_autograd_through_phi"),
    # ---- forward gradients ----
    Mutant("rules/forward_gradient.py", "d.mean() if weights", "d.sum() if weights",
           "the slope of the sum, not of the mean",
           "test_forward_gradient.py::test_the_mean_of_many_estimates_is_backprops_gradient"),
    Mutant("rules/forward_gradient.py", "block.local_jvp(lean.to(t.a.dtype), t)",
           "lean.to(t.a.dtype)", "a tangent that passes phi as it is",
           "test_forward_gradient.py::test_the_slope_is_autograds[0.0-mlp_problem-weights]"),
    Mutant("block.py", "return v if t.mask is None else v * t.mask", "return v",
           "a tangent that no mask stops", "test_forward_gradient.py::"
           "test_the_slope_is_autograds[0.3-mlp_problem-weights]"),
    Mutant("rule.py", "grads |= gradients", "grads = gradients | grads",
           "the outer product in place of the gradient by name", "test_forward_gradient.py::"
           "test_guessed_activities_are_signals_and_guessed_weights_teach_no_unit"),
    # ---- the gradient ----
    Mutant("rule.py", "block.outer(delta, r, 1 / batch)",
           "block.outer(delta, r, 1 / (len(x) if l == len(self.net) - 1 else 1))",
           "hidden signal not divided by the batch",
           "test_equivalence.py::test_T12_a_batchs_gradient_is_the_mean_of_its_samples_gradients"),
    Mutant("rule.py", "if paired else {}", "if True else {}", "a signal of other samples",
           "test_rule.py::test_a_convolution_is_not_taught_by_other_samples_than_its_input"),
    Mutant("rule.py", "if p.grad is None else", "if True else", "gradient overwritten",
           "test_rule.py::test_two_backward_calls_accumulate_the_sum_of_both[mlp-backprop]"),
    Mutant("rule.py", "if p.requires_grad and q.requires_grad}", "if q.requires_grad or True}",
           "frozen parameters get gradients",
           "test_rule.py::test_backward_leaves_parameters_that_need_no_gradient_alone"),
    Mutant("rules/feedback.py", 'linear.weight", 1.0)', 'linear.weight", 0.0)',
           "Kolen-Pollack's feedback learns nothing", "test_equivalence.py::"
           "test_T2_kolen_pollack_feedback_approaches_the_weights_at_the_rate_of_the_decay"),
    # ---- feedback and its options ----
    Mutant("rules/feedback.py", "kind: type[Tensor] = nn.Buffer",
           "kind = staticmethod(lambda B: nn.Buffer(B, persistent=False))",
           "feedback left out of state_dict",
           "test_feedback.py::test_what_is_fixed_is_a_buffer_and_what_learns_is_a_parameter"),
    Mutant("rules/feedback.py", "feedback_scale * math.sqrt(6 / size)", "math.sqrt(6 / size)",
           "an option without effect",
           "test_feedback.py::test_halving_the_scale_halves_the_signal_below_the_output"),
    Mutant("rules/feedback.py", 'fixed = magnitude == "fixed"', "fixed = False",
           "an option that falls through to the other",
           "test_feedback.py::test_magnitude_changes_the_hidden_gradients_in_size_and_direction"),
    Mutant("init.py", "torch.rand(shape, generator=generator, device=device) * 2",
           "torch.rand(shape, device=device) * 2", "weights from the global generator",
           "test_network.py::test_initial_weights_come_from_the_given_generator_alone"),
    # ---- PEPITA and mirroring ----
    Mutant("rules/pepita.py", "t_err.r, h - h_err", "t_err.r, h_err - h",
           "hidden signal of the wrong sign", "test_pepita.py::"
           "test_gradients_of_an_mlp_are_the_equations_with_one_mask_for_both_passes"),
    Mutant("rules/pepita.py", "params, h_err, masks.get(l)", "params, h_err, None",
           "second pass without the dropout mask", "test_pepita.py::"
           "test_gradients_of_an_mlp_are_the_equations_with_one_mask_for_both_passes"),
    Mutant("rules/pepita.py", 'yield (t if self.presynaptic == "first" else t_err).r, error',
           "yield t_err.r, error", "the last block keeps the second pass's activity",
           "test_equivalence.py::"
           "test_T15_pepita_of_the_first_pass_is_backprop_for_every_eps_under_T5"),
    Mutant("rules/pepita.py", 't.r if self.presynaptic == "first" else t_err.r, h - h_err',
           "t_err.r, h - h_err", "the modulation stays at the synapses of hidden blocks",
           "test_equivalence.py::"
           "test_T15_pepita_of_the_first_pass_is_backprop_for_every_eps_under_T5"),
    Mutant("rules/pepita.py", 'register_buffer("F", feedback)',
           'register_buffer("F", feedback, persistent=False)', "F left out of state_dict",
           "test_feedback.py::test_what_is_fixed_is_a_buffer_and_what_learns_is_a_parameter[pepita]"),
    Mutant("rules/pepita.py", "scale = -scale / len(h)", "scale = scale / len(h)",
           "released scaling without its sign", "test_pepita.py::"
           "test_sum_is_positions_times_the_mean_and_released_is_minus_the_mean_over_the_batch"),
    Mutant("rules/pepita.py", "maxlen=1 if self.saving else None", "maxlen=None",
           "saving keeps every activity", "test_measure.py::"
           "test_memory_at_64_hidden_layers_beside_16_is_the_same_only_if_saving[saving]"),
    Mutant("rules/pepita.py", "-self.sign if l == 1 else 1", "-self.sign",
           "mirrored product of the wrong sign at even depth", "test_pepita.py::"
           "test_mirroring_turns_F_from_no_direction_to_minus_sign_times_the_transposed_weights"),
    Mutant("training/lockstep.py", "rule.refresh(*mine, generator).items()", "{}.items()",
           "feedback never refreshed", "test_pepita.py::"
           "test_fit_refreshes_before_each_epoch_from_the_seeds_generator"),
    Mutant("training/lockstep.py", "if rate != self.rate:", "if self.rate is None:",
           "a recorded step keeps its first rate",
           "test_device.py::test_a_recorded_step_trains_as_the_step_itself[one-backprop]"),
    Mutant("training/lockstep.py", "m.narrow(of_batch, start, size)", "m.narrow(of_batch, 0, size)",
           "masks drawn ahead are used again",
           "test_device.py::test_a_recorded_step_trains_as_the_step_itself[one-backprop]"),
    Mutant("training/device.py", "mine.copy_(theirs)", "pass",
           "a replay sees the first batch for ever",
           "test_device.py::test_a_recorded_step_trains_as_the_step_itself[one-backprop]"),
    Mutant("rule.py", "grad.stride() == p.stride()", "True",
           "a fused step on weights laid out otherwise", "test_rule.py::"
           "test_a_step_is_the_same_whatever_the_layout_of_the_weights[True]"),
    Mutant("training/fit.py", "value[bad >= 0] = torch.nan", "pass",
           "numbers of a seed that diverged", "test_fit.py::"
           "test_a_seed_that_diverged_has_no_numbers_from_there_though_its_stack_goes_on"),
    Mutant("training/device.py", '["tf32" if tf32 else "ieee"]', '["tf32"]',
           "float32 convolutions are TF32", "test_device.py::"
           "test_precision_is_what_was_asked_for_inside_and_what_it_was_outside[float32]"),
    Mutant("training/lockstep.py", "{**rule.params(), **rule.state()}.items()",
           "rule.params().items()", "refreshed feedback not given back", "test_pepita.py::"
           "test_vectorised_seeds_get_back_the_feedback_of_seeds_one_at_a_time"),
    # ---- EKDAA ----
    Mutant("rules/ekdaa.py", "moved = torch.sub(a,", "moved = torch.add(a,",
           "target on the wrong side",
           "test_ekdaa.py::test_gradients_of_an_mlp_are_the_equations"),
    Mutant("rules/ekdaa.py", "W.clone() if", "W if",
           "feedback that is the weights, not a copy",
           "test_ekdaa.py::test_feedback_starts_as_a_copy_of_the_weights_and_draws_nothing"),
    Mutant("rules/ekdaa.py", 'linear.weight", self.gamma)', 'linear.weight", 1.0)',
           "gamma without effect",
           "test_equivalence.py::"
           "test_T8_feedback_less_gamma_times_the_weights_shrinks_with_the_decay_alone"),
    Mutant("rules/ekdaa.py", "torch.promote_types(t.a.dtype, torch.float32)", "t.a.dtype",
           "signals that are differences of rounded activities",
           "test_rule.py::test_autocast_keeps_small_errors_of_a_trained_network[ekdaa]"),
    Mutant("experiments/released.py", "F.interpolate(moved,", "a - self.beta * F.interpolate(v,",
           "up-sampled feedback in the place of an up-sampled target",
           "test_ekdaa.py::test_a_target_that_is_up_sampled_teaches_without_any_error"),
    # ---- leader-follower networks ----
    Mutant("rules/leader_follower.py", "largest=False", "largest=True",
           "the worst workers lead", "test_equivalence.py::"
           "test_every_rule_is_its_equation_on_any_network[lfnn-l]"),
    Mutant("rules/leader_follower.py", "following * (s - best)", "following * (best - s)",
           "followers flee the best", "test_equivalence.py::"
           "test_every_rule_is_its_equation_on_any_network[lfnn-l]"),
    Mutant("rules/leader_follower.py", "self.forward_only = local", "self.forward_only = False",
           "every block's activity kept until the end", "test_leader_follower.py::"
           "test_peak_memory_of_fifty_blocks_is_a_fifth_of_backprops"),
    Mutant("rules/leader_follower.py", "(self._each_block if self.local else self._end_to_end)",
           "self._end_to_end", "LFNN-l reads the weights above", "test_equivalence.py::"
           "test_T10_what_is_downstream_of_a_block_changes_no_bit_of_its_update"),
    Mutant("rules/leader_follower.py", "u / h[0, 0].numel()", "u",
           "a mean over positions whose gradient is a sum's", "test_leader_follower.py::"
           "test_workers_that_see_their_own_channels_and_units"),
    Mutant("rules/leader_follower.py", "seen.to(q.dtype)) / len(h)", "seen.to(q.dtype))",
           "heads learn from a sum over the batch", "test_equivalence.py::"
           "test_every_rule_is_its_equation_on_any_network[lfnn-l]"),
    # ---- next-layer attention ----
    Mutant("rules/attention.py", "W.sign() * W.abs()", "W.abs()",
           "an audience without signs", "test_equivalence.py::"
           "test_T11_attention_to_the_square_is_backprop_and_to_the_modulus_sign_symmetry"),
    Mutant("rules/attention.py", "(1 - paid / whole) / whole", "1 / whole",
           "a share that does not count itself", "test_equivalence.py::"
           "test_every_rule_is_its_equation_on_any_network[attention-relative]"),
    Mutant("rules/attention.py", "params[name] - step", "params[name] + step",
           "the audience before its step, mirrored", "test_equivalence.py::"
           "test_T11_the_signal_is_the_slope_of_the_attention_after_the_audiences_step"),
    Mutant("rules/attention.py", "torch.where(t.h != 0, v, 0.0)", "v",
           "the silent hear", "test_attention.py::"
           "test_a_silent_neuron_whose_derivative_is_not_zero_hears_nothing"),
    Mutant("rules/attention.py", "norm > 0", "norm >= 0",
           "attention to nobody is no number", "test_attention.py::"
           "test_scaled_feedback_has_the_norm_of_the_weights"),
    # ---- networks ----
    Mutant("network.py", "min(round(block.dropout * 2**16), 2**16 - 1)",
           "round(block.dropout * 2**16)", "dropout close to one drops nothing",
           "test_network.py::test_a_probability_just_below_one_drops_nearly_all"),
    Mutant("network.py", " / (1 - block.dropout)", "", "dropout not rescaled",
           "test_network.py::test_masks_are_zero_or_the_inverse_keep_probability"),
    Mutant("network.py", "if self.training and block.dropout:", "if block.dropout:",
           "dropout in evaluation mode",
           "test_network.py::test_there_are_no_masks_in_evaluation_mode_or_without_dropout"),
    Mutant("block.py", 'if linear.padding_mode != "zeros":', "if False:",
           "reflect padding becomes zeros without a word",
           "test_network.py::test_a_misuse_is_refused_and_the_given_value_named[padding mode]"),
    Mutant("refuse.py", "high >= net.num_classes", "high > net.num_classes",
           "a label that is no class is accepted",
           "test_rule.py::test_a_bad_batch_is_refused_by_name_and_changes_nothing"),
    # ---- any model ----
    Mutant("convert.py", ' or options.get("is_causal")', "",
           "causal attention that is not", "test_convert.py::"
           "test_attention_in_a_way_that_is_not_exchanged_is_refused[causal]"),
    Mutant("convert.py", "return delta, v.to(dtype), None, None",
           "return delta, None, None, None", "no error reaches what is below", "test_convert.py::"
           "test_attention_of_p_2_is_backprop_and_any_other_feedback_changes_what_is_below[vit]"),
    Mutant("convert.py", "op(x.detach(), W), x, M", "op(x, W), x, M",
           "the error descends by the weights too",
           "test_convert.py::test_gradients_are_those_of_the_rule_on_blocks[fa-mlp]"),
    Mutant("convert.py", "W = W + (B - M)", "W = W + 0 * B",
           "Kolen-Pollack's feedback rests in any model", "test_convert.py::"
           "test_T2_learning_feedback_approaches_the_weights_at_the_rate_of_the_decay"),
    Mutant("training/stages.py", "h.detach() if local else h", "h",
           "gradients cross from stage to stage",
           "test_stages.py::test_a_stage_is_deaf_to_all_above_it_only_if_local[True]"),
    Mutant("training/stages.py", "(weight * loss).backward()", "total = total + weight * loss",
           "a stage's graph is kept until the end",
           "test_stages.py::test_memory_is_that_of_the_largest_stage_and_not_of_all"),
    Mutant("training/course.py", '"seen": self.seen', '"seen": []',
           "curves of a resumed run begin at its resumption", "test_stages.py::"
           "test_interrupted_after_each_epoch_it_goes_on_to_the_same_bits[sgd]"),
    Mutant("training/course.py", "self.stages.train()", "pass",
           "batch norm counts no batch", "test_stages.py::"
           "test_curves_are_of_all_stages_and_the_last_ones_are_the_runs"),
    # ---- training, measures, data ----
    Mutant("training/fit.py", "[torch.Generator().manual_seed(seed) for seed in group]",
           "[torch.Generator().manual_seed(group[0])] * len(group)", "seeds share a generator",
           "test_fit.py::test_the_order_of_seeds_does_not_matter"),
    Mutant("training/lockstep.py", "**self.state}[name][s]", "**self.state}[name][0]",
           "every seed gets the first one's weights",
           "test_fit.py::test_the_order_of_seeds_does_not_matter"),
    Mutant("training/lockstep.py", 'group["lr"] = rate * lr', 'group["lr"] = lr',
           "schedule without effect",
           "test_fit.py::test_the_schedule_is_asked_once_per_epoch"),
    Mutant("measure.py", "2 * torch.atan2((u - v).norm(), (u + v).norm())",
           "torch.acos((u * v).sum().clamp(-1, 1))", "small angles lose their digits",
           "test_measure.py::test_tiny_angles_keep_their_digits"),
    Mutant("experiments/record.py", "{**defaults, **result", "{**result",
           "a new field makes every record another recipe's", "test_results.py::"
           "test_a_field_newer_than_the_file_is_good_at_its_default_alone"),
    Mutant("experiments/record.py", "runs = {**result[\"runs\"], **new}", "runs = new",
           "seeds of another process are lost", "test_results.py::"
           "test_a_seed_that_another_process_recorded_meanwhile_stays"),
    Mutant("refuse.py", "if was != now:", "if False:",
           "a network changed under its rule", "test_rule.py::"
           "test_a_network_changed_after_its_rule_was_made_is_refused_and_not_trained"),
    Mutant("rule.py", "if p.requires_grad and q.requires_grad", "if p.requires_grad",
           "feedback learns beside a frozen weight",
           "test_rule.py::test_feedback_beside_a_frozen_weight_rests_with_it"),
    Mutant("training/fit.py", "values[0] <= LARGEST_LOSS", "values[0].isfinite()",
           "a loss of 10^20 is training",
           "test_fit.py::test_a_loss_out_of_every_sensible_range_has_diverged"),
    Mutant("refuse.py", "own[key].mul_(-1e3).add_(1)", "pass",
           "a rule may read itself", "test_fit.py::"
           "test_a_rule_whose_update_is_not_pure_is_told_so_and_left_as_it_was"),
    # ---- several processes ----
    Mutant("training/ranks.py", "(flat / self.size)", "flat", "gradients summed over ranks",
           "test_distributed.py::test_fit_on_ranks_is_fit_in_one_process"),
    Mutant("training/lockstep.py", "share(m.narrow(of_batch, start, size), of_batch)",
           "m.narrow(of_batch, start, size // self.ranks.size)", "ranks share one dropout mask",
           "test_distributed.py::test_fit_on_ranks_is_fit_in_one_process"),
    Mutant("training/distributed.py", "run.flow(\"train\", batches[step:], draws[epoch])",
           "run.flow(\"train\", batches, draws[epoch])", "an epoch begins anew after a kill",
           "test_distributed.py::"
           "test_after_the_kill_of_a_rank_the_same_calls_come_to_the_same_end"),
    Mutant("images.py", "(draw + 2654435761 * index)", "(2654435761 * index)",
           "every epoch crops a picture alike", "test_images.py::"
           "test_what_befalls_a_picture_is_decided_by_its_number_and_the_draw[0]"),
    Mutant("data.py", "if not check_integrity(path, md5):", "if False:",
           "damaged files are read", "test_data.py::test_a_damaged_file_is_named_and_not_loaded"),
    Mutant("training/checkpoint.py", "add(sorted(map(digest, value)))", "add(len(value))",
           "a checkpoint goes on with another set", "test_checkpoint.py::"
           "test_an_option_of_a_rule_counts_by_what_it_holds_and_computes[set]"),
    # ---- tasks one after the other ----
    Mutant("experiments/tasks.py", "best = R[..., 1:-1, :-1].amax(-2)",
           "best = R[..., :-1, :-1].amax(-2)", "a task's best includes luck before training",
           "test_continual.py::test_what_a_matrix_says"),
    Mutant("experiments/tasks.py", "outer(delta**2, r**2, 1 / len(x))",
           "outer(delta, r, 1 / len(x))", "the mean gradient in the place of the mean square",
           "test_continual.py::test_importance_is_the_mean_square_of_the_samples_gradients"),
    Mutant("experiments/tasks.py", '(state[f"n{l}"] / W.norm()) ** self.power',
           'state[f"n{l}"] / W.norm()', "the control shrinks too little",
           "test_continual.py::test_the_control_is_backprop_at_first_and_shrinks_by_one_number"),
    Mutant("experiments/continual.py", "            value.copy_(self.params[name])\n",
           "            pass\n", "what a head has learnt is lost",
           "test_continual.py::test_a_task_leaves_the_heads_of_the_others_alone"),
    Mutant("experiments/continual.py", '"rows": self.rows, ', '"rows": [], ',
           "a checkpoint forgets the matrix",
           "test_continual.py::test_a_record_interrupted_at_any_task_ends_with_the_same_bits"),
    Mutant("experiments/continual.py", "mark += self.scenario", "mark += self.name",
           "a checkpoint continues another scenario",
           "test_continual.py::test_a_checkpoint_of_another_scenario_is_refused"),
    Mutant("experiments/continual.py", '"heads": self.heads, "at"', '"heads": [], "at"',
           "a checkpoint forgets the heads",
           "test_continual.py::test_a_kill_within_a_task_costs_no_bit"),
    Mutant("experiments/continual.py", "rule.consolidate(self.params",
           "0 and rule.consolidate(self.params", "finished tasks leave EWC no importance",
           "test_continual.py::test_ewc_with_much_strength_hardly_moves_after_its_first_task"),
    Mutant("experiments/tasks.py", "+ k * (params[name] -", "- k * (params[name] -",
           "elastic weights are pushed away",
           "test_continual.py::test_ewc_adds_the_gradient_of_its_penalty"),
    Mutant("experiments/tasks.py", 'for part in ("train", "test"):',
           'for part in ("train", "test"):\n            order = order.roll(part == "test")',
           "test images in another order than training images",
           "test_continual.py::"
           "test_permuted_tasks_are_the_same_images_in_orders_of_their_own"),
    # ---- the locality audit ----
    Mutant("probe.py", "free = free - free @ V.T @ V", "pass",
           "a direction that activities meet",
           "test_audit.py::test_every_rule_drops_the_demands_that_its_equations_drop"),
    Mutant("audit.py", "seen.rows[name]), random", "seen.rows[name][:1]), random",
           "null space of the first pass alone",
           "test_audit.py::test_every_rule_drops_the_demands_that_its_equations_drop"),
    Mutant("audit.py", "after = it.step(moved,", "after = it.step(params,",
           "weights above stay",
           "test_audit.py::test_every_rule_drops_the_demands_that_its_equations_drop"),
    Mutant("probe.py", "refresh(of or self.params,", "refresh(self.params,",
           "a refresh that sees nothing",
           "test_audit.py::test_a_cheat_is_caught_by_its_question"),
    Mutant("audit.py", "2 * d + both[n] - rest[n] - one[n]", "d",
           "no other sample is changed",
           "test_audit.py::test_a_cheat_is_caught_by_its_question"),
    Mutant("probe.py", "out = out + self.shift[1]", "pass",
           "no intervention on the output",
           "test_audit.py::test_every_rule_drops_the_demands_that_its_equations_drop"),
    Mutant("audit.py", "block_of.get(n, -1) > k}", "block_of.get(n, -1) > k + 1}",
           "the block above is left as it was",
           "test_audit.py::test_every_rule_drops_the_demands_that_its_equations_drop"),
    Mutant("audit.py", "if k < l < L - 1 else", "if k <= l < L - 1 else",
           "the block's own derivative is changed",
           "test_audit.py::test_every_rule_drops_the_demands_that_its_equations_drop"),
    Mutant("audit.py", '["sweep", "graph"]', '["sweep"]',
           "a graph of autograd is no backward phase",
           "test_audit.py::test_a_graph_through_the_network_is_a_backward_phase"),
    Mutant("audit.py", 'float(f"{l}.linear', 'float(f"{l - 1}.linear',
           "a graph is reported one block too high",
           "test_audit.py::test_a_graph_through_the_network_is_a_backward_phase"),
    Mutant("probe.py", "enumerate(own) for name in names}", "enumerate(own) for name in ()}",
           "heads above stay",
           "test_audit.py::test_a_cheat_is_caught_by_its_question"),
    Mutant("probe.py", "live = rows.any(0)", "live = rows.any(0) | True",
           "weights out of silent units hide what is read",
           "test_audit.py::test_weights_out_of_silent_units_do_not_hide_what_is_read"),
    Mutant("probe.py", "[a + b for a, b in zip(self.blocks.values(), own, strict=True)]",
           "[*self.blocks.values()]", "what a rule learns beside the weights is not seen",
           "test_audit.py::test_a_cheat_is_caught_by_its_question"),
]  # fmt: skip


def run(mutant: Mutant | None, tests: list[str]) -> tuple[str, float]:
    """Verdict and seconds of one mutant on its test; for None, of the package as it is on all.

    Runs in a process of its own, which must not have imported the package before.
    """
    start = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="bpfree-mutant-") as folder:
        copy = Path(folder).resolve() / "bpfree"
        shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("__pycache__"))
        if mutant:
            path = copy / mutant.file
            source = path.read_text()
            if (times := source.count(mutant.old)) != 1:
                return f"STALE: the old text occurs {times} times", 0.0
            path.write_text(source.replace(mutant.old, mutant.new))
        sys.path.insert(0, str(copy.parent))
        output = io.StringIO()
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
            status = pytest.main([*OPTIONS, *(str(TESTS / test) for test in tests)])
        tested = Path(sys.modules["bpfree"].__file__).parent if "bpfree" in sys.modules else None
    seconds = time.perf_counter() - start
    expected = pytest.ExitCode.TESTS_FAILED if mutant else pytest.ExitCode.OK
    if tested == copy and status == expected:
        return ("caught" if mutant else "passes"), seconds
    if tested == copy and mutant and status == pytest.ExitCode.OK:
        return "SURVIVED", seconds
    return f"BROKEN, tested {tested}:\n{output.getvalue()}", seconds


def warm_up() -> None:
    """Import here, once, what every child needs and PyTorch imports late."""
    import hypothesis  # noqa: F401
    import sklearn.datasets  # noqa: F401
    import torchvision  # noqa: F401

    torch.set_num_threads(1)
    torch.nn.Linear(1, 1, device="meta")(torch.empty(1, 1, device="meta"))
    torch.vmap(torch.sin)(torch.ones(1))
    torch.optim.SGD([torch.ones(1)]).step()


def main(files: list[str]) -> int:
    start = time.perf_counter()
    chosen = [m for m in MUTANTS if not files or m.file in files]
    if unknown := set(files) - {m.file for m in chosen}:
        print(f"no mutant of {', '.join(sorted(unknown))}: add one to MUTANTS in tests/mutate.py")
        return 2
    jobs = [(None, sorted({m.test for m in chosen})), *((m, [m.test]) for m in chosen)]
    forks = "fork" in multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("fork" if forks else "spawn")
    if forks:
        warm_up()
    with context.Pool(PROCESSES, maxtasksperchild=1) as pool:
        (verdict, seconds), *results = pool.starmap(run, jobs, chunksize=1)
    print(f"{verdict:9}{seconds:5.1f} s  without a defect")
    good = verdict == "passes"
    for mutant, (verdict, seconds) in zip(chosen, results, strict=True):
        good &= verdict == "caught"
        print(f"{verdict:9}{seconds:5.1f} s  {mutant.file:20} {mutant.reason:52} {mutant.test}")
    caught = sum(verdict == "caught" for verdict, _ in results)
    print(f"{caught} of {len(chosen)} caught in {time.perf_counter() - start:.0f} s")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
