"""All planted faults."""

from collections import Counter

from benchmarks.doctor_cases.cases import Case
from benchmarks.doctor_cases.planted_batches import bad_labels, degenerate_batches
from benchmarks.doctor_cases.planted_data import bad_data
from benchmarks.doctor_cases.planted_learning import exploding_gradients, learning_rates
from benchmarks.doctor_cases.planted_numerics import loss_functions
from benchmarks.doctor_cases.planted_precision import optimizer_states, precision
from benchmarks.doctor_cases.planted_weights import initialisations, received_models, unproven


def planted_cases() -> list[Case]:
    """Return the planted cases in the order of their causes."""
    cases = [
        *bad_labels(),
        *bad_data(),
        *degenerate_batches(),
        *loss_functions(),
        *precision(),
        *optimizer_states(),
        *received_models(),
        *initialisations(),
        *exploding_gradients(),
        *learning_rates(),
        *unproven(),
    ]
    twice = [name for name, count in Counter(case.name for case in cases).items() if count > 1]
    assert not twice, twice
    return cases
