"""The tests of trainings on the device of `device.py`, as a plugin of pytest: see `tests/test_standin.py`."""

import functools

import pytest
from torch import nn

import sltt
from tests.standin import device

assert device.LIBRARY
CPU, HOST = "it is about the CPU", "it compares with tensors of the host while it trains"
PEAK, CALLS = "PyTorch counts no peak of memory there", "a graph does not call the rule, which stops the training"
OTHERS = {
    "test_a_cpu_has_no_graphs": CPU,
    "test_a_graphed_rule_needs_a_gpu": CPU,
    "test_a_phase_crops_its_samples_at_random_places_and_the_next_sees_them_whole": HOST,
    "test_a_replay_repeats_what_is_done_in_place_and_not_what_is_assigned": HOST,
    "test_a_resumed_run_ends_with_the_same_bits": "it is about the CPU's sparse layers",
    "test_averaged_weights_are_those_of_dense_layers_and_are_read_in_each_evaluation": "likewise",
    "test_ctrl_c_saves_and_a_resumed_run_ends_as_one_that_never_stopped[6": CALLS,
    "test_ctrl_c_saves_and_a_resumed_run_ends_as_one_that_never_stopped[8": CALLS,
    "test_normalisation_has_rates_and_weight_decay_of_its_own_in_all_phases": "a copy has other parameters",
    "test_parts_take_the_memory_of_a_part": PEAK,
    "test_peak_memory_is_that_of_a_batch_under_its_rule": PEAK,
    "test_settings_that_do_not_fit_are_refused_before_a_training[0]": "a copy of lazy weights is not lazy",
    "test_settings_that_do_not_fit_are_refused_before_a_training[9]": CPU,
    "test_the_average_is_that_of_the_equation_statistics_too": HOST,
    "test_the_log_of_a_resumed_run_is_whole": CALLS,
    "test_the_next_batch_is_on_the_device_before_the_host_waits_for_a_loss": "it waits a batch later",
    "test_the_scale_of_gradients_continues": "the device has no scaler",
    "test_the_trial_of_the_first_batch_does_not_count_and_the_figure_is_that_of_the_commands": PEAK,
    "test_twenty_kills_change_nothing": "its processes have no such device",
    "test_weights_are_cast_once_a_batch": "a capture casts once more",
}


def back(function):
    """Return the function, behind which the networks that it was given are on the host, where the tests look."""

    @functools.wraps(function)
    def run(*args, **kwargs):
        try:
            return function(*args, **kwargs)
        finally:
            for one in (*args, *kwargs.values()):
                if isinstance(one, nn.Module):
                    one.cpu()

    return run


sltt.fit, sltt.evaluate = back(sltt.fit), back(sltt.evaluate)


def pytest_collection_modifyitems(items):
    for item in items:
        for name, reason in OTHERS.items():
            if item.name.startswith(name):
                item.add_marker(pytest.mark.skip(reason=reason))
