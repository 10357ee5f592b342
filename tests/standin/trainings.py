"""The tests of trainings on the device of `device.py`, as a plugin of pytest: see `tests/test_standin.py`."""

import functools

import pytest
from torch import nn

import sltt
from tests.standin import device

assert device.LIBRARY
OTHERS = {  # beginnings of the names of tests
    "it is about the CPU": "a_cpu_has a_graphed_rule_needs settings_that_do_not_fit_are_refused_before_a_training[6] "
    "a_resumed_run_ends_with_the_same_bits averaged_weights_are_those_of_dense_layers",
    "it compares with tensors of the host": "a_phase_crops a_replay_repeats the_average_is_that_of_the_equation",
    "a graph does not call the rule, which ends the training": "ctrl_c_saves_and_a_resumed_run_ends_as_one_that_never_"
    "stopped[6 ctrl_c_saves_and_a_resumed_run_ends_as_one_that_never_stopped[8 the_log_of_a_resumed",
    "no peak is counted": "parts_take_the_memory peak_memory_is the_trial_of_the_first_batch",
    "a copy has other parameters": "normalisation_has_rates",
    "it waits a batch later": "the_next_batch_is_on_the_device",
    "there is no scaler": "the_scale_of_gradients",
    "processes have no such device": "twenty_kills",
    "a capture casts once more": "weights_are_cast",
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
        for reason, names in OTHERS.items():
            if item.name.startswith(tuple(f"test_{name}" for name in names.split())):
                item.add_marker(pytest.mark.skip(reason=reason))
