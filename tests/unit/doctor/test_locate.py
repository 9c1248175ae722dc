"""Planted values in small networks: the operation that made them is named, with phase and module.

What each case expects follows from the network: which operation is the first that can't give a
finite result for finite numbers.
"""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedrounds.diagnosis.values import Origin, StepPhase
from fedrounds.doctor.batches import Batch
from fedrounds.doctor.locate import locate
from tests.small_networks import (
    Apply,
    Forward,
    cross_entropy,
    hidden_of,
    network,
    origin_of,
    outputs_of,
    pair,
    parameter_of,
    samples,
    small,
    where,
)

NAN, INF = float("nan"), float("inf")


FORWARD_FAULTS: dict[str, tuple[Forward, str]] = {
    "log of zero": (lambda x: small(x).log(), "log"),
    "root of a negative number": (lambda x: (small(x) - 1).sqrt(), "sqrt"),
    "one by zero": (lambda x: 1 / small(x), "reciprocal"),
    "zero by zero": (lambda x: x.relu() / x.relu(), "div"),
    "exp overflows": (lambda x: (1000 * x.abs()).exp(), "exp"),
    "negative power of zero": (lambda x: small(x) ** -2, "pow"),
    "product overflows": (lambda x: (x + 10) * 1e38, "mul"),
    "sum overflows": (lambda x: x + (x.sigmoid() * 3e38).sum(1, keepdim=True), "sum"),
    "half overflows": (lambda x: ((x + 10) * 1e5).half().float(), "_to_copy"),
    "in place": (lambda x: x.clone().sub_(x).log_(), "log_"),
    "arc cosine outside": (lambda x: (2 + x.abs()).acos(), "acos"),
    "zero times a constant infinity": (lambda x: (x > 1e9) * -INF + x, "mul"),
    "a softmax with everything masked": (
        lambda x: x.masked_fill(torch.arange(8)[:, None] == 3, -INF).softmax(1),
        "_softmax",
    ),
    "the logarithm of a mask that covers everything": (
        lambda x: (x + torch.zeros(6).log()).softmax(1),
        "log",
    ),
    "infinity minus infinity": (lambda x: x.clamp(max=-INF) - x.clamp(max=-INF), "sub"),
}


@pytest.mark.parametrize("name", FORWARD_FAULTS)
def test_the_operation_of_the_forward_is_named(name: str) -> None:
    """The operation that made it, though all that follow pass it on; inside of its module."""
    function, operation = FORWARD_FAULTS[name]
    assert where(locate(network(Apply(function)), samples(), cross_entropy)) == (
        *("forward", "1"),
        operation,
    )


@pytest.mark.parametrize("name", FORWARD_FAULTS)
def test_the_operation_of_the_loss_is_named(name: str) -> None:
    """The same outside of the model's forward is the loss's."""
    function, operation = FORWARD_FAULTS[name]

    def compute_loss(model: nn.Module, batch: Batch) -> Tensor:
        return function(outputs_of(model, batch).repeat(1, 2)).mean()

    assert where(locate(network(), samples(), compute_loss)) == ("loss", "", operation)


def test_the_numbers_of_the_first_bad_tensor() -> None:
    """Its dtype, shape, counts, first position, and the largest number that went in."""
    fault = locate(network(Apply(lambda x: (small(x) * 0.5).log())), samples(), cross_entropy)
    origin = origin_of(fault)
    assert origin == Origin(
        phase=StepPhase.FORWARD,
        module="1",
        operation="log",
        dtype="float32",
        shape=(8, 6),
        num_inf=1,
        first_index=(2, 1),
    )
    assert fault is not None
    assert 0.25 < fault.largest_input <= 0.5


def test_an_overflow_in_half_precision_says_its_dtype_and_the_number() -> None:
    """Seventy thousand is a number in float32 and none in float16, which ends at 65504."""
    fault = locate(network(Apply(lambda x: (0 * x + 7e4).half())), samples(), in_float)
    origin = origin_of(fault)
    assert (origin.operation, origin.dtype, origin.num_inf) == ("_to_copy", "float16", 48)
    assert fault is not None
    assert fault.largest_input == pytest.approx(7e4)


def in_float(model: nn.Module, batch: Batch) -> Tensor:
    """Return a loss of the hidden values."""
    return hidden_of(model, batch, last=1).float().mean()


def test_an_autocast_product_overflows() -> None:
    """Under autocast the linear layer is computed in bfloat16; 1e39 is too much for that, too."""

    def compute_loss(model: nn.Module, batch: Batch) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return outputs_of(model, batch).float().mean()

    model = network()
    with torch.no_grad():
        parameter_of(model, "2.weight").fill_(3e38)
    origin = origin_of(locate(model, samples(), compute_loss))
    assert (origin.module, origin.operation, origin.dtype) == ("2", "addmm", "bfloat16")


HARMLESS: dict[str, Forward] = {
    "masked_fill under a softmax": lambda x: x.masked_fill(x < 0, -INF).softmax(1),
    "where": lambda x: torch.where(x < 0, torch.tensor(-INF), x).softmax(1),
    "a mask of full": lambda x: (x + torch.full((6, 6), -INF).triu(1)[3]).softmax(1),
    "the logarithm of a mask": lambda x: (x + torch.eye(6)[2].log()).softmax(1),
    "a maximum from minus infinity on": lambda x: torch.full_like(x, -INF).maximum(x),
    "max-pooling with padding": lambda x: F.max_pool1d(x[:, None], 3, 1, padding=1)[:, 0],
    "nan_to_num": lambda x: (x.detach() / 0).nan_to_num(posinf=1, neginf=-1) + x,
    "a minimum of infinities": lambda x: torch.minimum(x, torch.tensor(INF)),
    "memory that is filled later": lambda x: torch.empty_like(x).copy_(x),
    "exp to infinity and back": lambda x: 1 / (1 + (1000 * x.detach()).exp()) + x,
    "attention": lambda x: F.scaled_dot_product_attention(
        x[None, None], x[None, None], x[None, None], torch.ones(8, 8).tril().bool()
    )[0, 0],
}


@pytest.mark.parametrize("name", HARMLESS)
def test_infinities_that_die_are_no_fault(name: str) -> None:
    """Masks, paddings and starting values: the step is finite, so there is no fault."""
    model = network(Apply(HARMLESS[name]))
    optimizer = torch.optim.Adam(model.parameters())
    fault = locate(model, samples(), cross_entropy, optimizer_step=optimizer.step)
    assert fault is None


@pytest.mark.parametrize("name", HARMLESS)
def test_they_do_not_hide_the_fault_beside_them(name: str) -> None:
    """With a mask in one layer and a logarithm of zero in the next, the logarithm is named."""
    masked = HARMLESS[name]
    model = network(nn.Sequential(Apply(masked), Apply(lambda x: small(x).log())))
    assert where(locate(model, samples(), cross_entropy)) == ("forward", "1.1", "log")


def test_a_recurrent_network_and_a_transformer_are_healthy() -> None:
    """Whole layers of torch, with a causal mask, Adam and clipping: there is no fault."""
    torch.manual_seed(0)

    class Reader(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(9, 8)
            self.gru = nn.GRU(8, 8, batch_first=True)
            self.encoder = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.1, batch_first=True)
            self.head = nn.Linear(8, 9)
            self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(5))

        def forward(self, tokens: Tensor) -> Tensor:
            read, _ = self.gru(self.embedding(tokens))
            return self.head(self.encoder(read, src_mask=self.mask)).transpose(1, 2)  # type: ignore[no-any-return]

    model = Reader()
    tokens = torch.randint(0, 9, (4, 5))
    optimizer = torch.optim.AdamW(model.parameters())

    def step() -> None:
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    assert locate(model, (tokens, tokens), cross_entropy, optimizer_step=step) is None
    with torch.no_grad():
        model.encoder.linear1.weight.fill_(3e38)
    fault = locate(model, (tokens, tokens), cross_entropy, optimizer_step=step)
    assert where(fault) == ("forward", "encoder.linear1", "addmm")


def test_a_mask_made_by_a_logarithm_comes_after_the_fault_it_is_added_to() -> None:
    """The mask's infinity is older, but the scores' overflow is what spoils the softmax."""

    def attend(scores: Tensor) -> Tensor:
        mask = torch.eye(6)[2].log()
        return (scores.sigmoid() * 2 * 3e38 + mask).softmax(1)

    fault = locate(network(Apply(attend)), samples(), cross_entropy)
    assert where(fault) == ("forward", "1", "mul")


def test_a_network_with_its_own_softmax_and_logarithm() -> None:
    """The classical mistake: log(softmax) of outputs far apart."""

    def compute_loss(model: nn.Module, batch: Batch) -> Tensor:
        inputs, labels = pair(batch)
        return F.nll_loss((1e4 * model(inputs)).softmax(1).log(), labels)

    assert where(locate(network(), samples(), compute_loss)) == ("loss", "", "log")


def test_a_loss_module_of_the_models_own_is_the_losss() -> None:
    """A part that is called alone after the whole forward belongs to the loss; it is named."""
    model = network()
    model.add_module("criterion", Apply(lambda x: (x - x).log().mean()))

    def compute_loss(module: nn.Module, batch: Batch) -> Tensor:
        loss = module.get_submodule("criterion")(hidden_of(module, batch, last=2))
        assert isinstance(loss, Tensor)
        return loss

    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = network()
            self.criterion = Apply(lambda x: (x - x).log().mean())

        def forward(self, inputs: Tensor) -> Tensor:
            return self.body(inputs)  # type: ignore[no-any-return]

    # Never called as a whole: its parts are its forward.
    assert where(locate(model, samples(), compute_loss)) == ("forward", "criterion", "log")
    fault = locate(Whole(), samples(), lambda m, b: m.get_submodule("criterion")(outputs_of(m, b)))
    assert where(fault) == ("loss", "criterion", "log")


@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_a_bad_input_is_named_with_its_position(value: float) -> None:
    """Phase INPUT, neither module nor tensor: these are the batch's."""
    inputs, labels = samples()
    inputs[5, 2] = value
    assert origin_of(locate(network(), (inputs, labels), cross_entropy)) == Origin(
        phase=StepPhase.INPUT,
        dtype="float32",
        shape=(8, 4),
        num_nan=int(math.isnan(value)),
        num_inf=int(math.isinf(value)),
        first_index=(5, 2),
    )


def test_a_bad_input_that_the_model_copes_with_is_reported_unless_something_else_is_bad() -> None:
    """Missing values that are filled in do no harm; the fault beside them is what counts."""
    inputs, labels = samples()
    inputs[5, 2] = NAN

    def compute_loss(model: nn.Module, batch: Batch) -> Tensor:
        inputs, labels = pair(batch)
        return F.cross_entropy(model(inputs.nan_to_num()), labels)

    assert where(locate(network(), (inputs, labels), compute_loss)) == ("input", "", "")
    bad = network(Apply(lambda x: small(x).log()))
    assert where(locate(bad, (inputs, labels), compute_loss)) == ("forward", "1", "log")


def test_an_entry_that_was_bad_before_the_step() -> None:
    """Phase FORWARD, no operation, the entry's name and owner."""
    model = network(nn.BatchNorm1d(6))
    with torch.no_grad():
        parameter_of(model, "2.weight")[1, 3] = NAN
    assert origin_of(locate(model, samples(), cross_entropy)) == Origin(
        phase=StepPhase.FORWARD,
        module="2",
        tensor="2.weight",
        dtype="float32",
        shape=(3, 6),
        num_nan=1,
        first_index=(1, 3),
    )
    model = network(nn.BatchNorm1d(6))
    for bad in (NAN, INF):
        model.get_buffer("1.running_var").fill_(1.0)[4] = bad
        origin = origin_of(locate(model, samples(), cross_entropy))
        assert (origin.module, origin.operation, origin.tensor) == ("1", "", "1.running_var")


def test_a_buffer_that_overflows_though_the_loss_is_finite() -> None:
    """BatchNorm of numbers whose square is too large: the running variance is the first victim."""
    model = network(nn.Sequential(Apply(lambda x: x * 1e20), nn.BatchNorm1d(6), nn.Tanh()))
    origin = origin_of(locate(model, samples(), cross_entropy))
    assert (origin.phase, origin.module) == (StepPhase.FORWARD, "1.1")
    assert origin.operation == "native_batch_norm"
    assert origin.tensor in ("", "1.1.running_var")


def test_a_constant_that_reaches_the_loss_is_named_for_want_of_another_cause() -> None:
    """Nothing makes it worse on the way: where it was written is all there is to say."""
    model = network(Apply(lambda x: x.masked_fill(x < 0, -INF)))
    fault = locate(model, samples(), lambda m, b: hidden_of(m, b, last=1).amin())
    assert where(fault) == ("forward", "1", "masked_fill")
