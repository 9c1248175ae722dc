"""Tasks whose models hold more than parameters, or what can't be sent: one of each kind.

`whole` has something of every kind that travels; `declared` the same with entries declared. The
names of `REFUSED` are tasks that a server refuses at its start.
"""

import math
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fedrounds.tasks.task import Task
from tests.tiny_task import NUM_CLASSES, NUM_FEATURES, tiny

WIDTH = 6


class Answers(NamedTuple):
    """What a model with an auxiliary head returns in training."""

    logits: Tensor
    aux: Tensor | None


class Whole(nn.Module):
    """A classifier with an entry of every kind.

    One BatchNorm is called on two inputs in each step and again under activation checkpointing, so
    that its counter runs four times as fast as the steps. In training the answers are a named tuple
    or a nested dictionary, in evaluation a tensor.
    """

    counter: Tensor
    queue: Tensor
    mask: Tensor
    causal: Tensor
    smallest: Tensor
    expanded: Tensor

    def __init__(self, structure: type = Answers) -> None:
        super().__init__()
        self.structure = structure
        self.first = nn.Linear(NUM_FEATURES, WIDTH)
        self.norm = nn.BatchNorm1d(WIDTH)
        self.tied = nn.Linear(WIDTH, WIDTH, bias=False)
        self.again = nn.Linear(WIDTH, WIDTH, bias=False)
        self.again.weight = self.tied.weight
        self.head = nn.Linear(WIDTH, NUM_CLASSES)
        self.scale = nn.Parameter(torch.ones((), dtype=torch.bfloat16))
        self.wide = nn.Parameter(torch.zeros(3, dtype=torch.float64))
        self.narrow = nn.Parameter(torch.zeros(2, dtype=torch.float16), requires_grad=False)
        self.empty = nn.Parameter(torch.zeros(0, 4))
        self.whole = nn.Parameter(torch.arange(3), requires_grad=False)
        self.turned = nn.Parameter(torch.zeros(4, 5).t())
        self.register_parameter("na/me with \u00e4 and 'quotes'", nn.Parameter(torch.ones(1)))
        self.register_buffer("counter", torch.zeros((), dtype=torch.int64))
        self.register_buffer("queue", torch.zeros(2, dtype=torch.int32))
        self.register_buffer("mask", torch.zeros(4, dtype=torch.bool))
        causal = torch.triu(torch.full((4, 4), -math.inf), diagonal=1)
        self.register_buffer("causal", causal)
        self.register_buffer("smallest", torch.tensor(math.inf))
        self.register_buffer("expanded", torch.full((1,), 0.5).expand(5))
        self.register_buffer("view", self.first.weight.detach()[:2])

    def forward(self, inputs: Tensor) -> Any:  # noqa: ANN401
        """Return answers [n, NUM_CLASSES], structured in training."""
        hidden = self.first(inputs) * self.scale
        hidden = hidden + self.norm(hidden) + self.norm(-hidden)
        hidden = hidden + checkpoint(self.norm, hidden, use_reentrant=False)
        hidden = F.relu(self.again(self.tied(hidden))) + self.expanded.sum()
        answers: Tensor = self.head(hidden) + self.wide.to(hidden.dtype)
        if not self.training:
            return answers
        with torch.no_grad():
            self.counter += 1
            self.queue[0] = (self.queue[0] + len(inputs)) % 7
            self.mask[int(self.counter) % 4] ^= True
            self.smallest.copy_(torch.minimum(self.smallest, inputs.min()))
        if self.structure is Answers:
            return Answers(logits=answers, aux=None)
        return OrderedDict(aux=answers * 2, out={"logits": answers})


def _loss(outputs: Any, targets: Tensor) -> Tensor:  # noqa: ANN401
    if isinstance(outputs, Answers):
        outputs = outputs.logits
    elif isinstance(outputs, dict):
        outputs = outputs["out"]["logits"]
    return F.cross_entropy(outputs, targets)


def _task(
    name: str, build_model: Callable[[], nn.Module], entries: Mapping[str, str] | None = None
) -> Task:
    return Task(
        name=name,
        build_model=build_model,
        load_train=tiny.load_train,
        load_test=tiny.load_test,
        loss=_loss,
        entries=entries or {},
    )


whole = _task("whole", Whole)
declared = _task(
    "declared",
    lambda: Whole(OrderedDict),
    {"queue": "local", "counter": "max", "mask": "max", "head.*": "local", "wide": "keep"},
)


def _with(entry: Callable[[nn.Linear], object]) -> Callable[[], nn.Module]:
    """Return what builds a linear model and does something to it."""

    def build() -> nn.Module:
        model = nn.Linear(NUM_FEATURES, NUM_CLASSES)
        entry(model)
        return model

    return build


class _WithExtraState(nn.Linear):
    def get_extra_state(self) -> Any:  # noqa: ANN401
        """Return what isn't a tensor."""
        return {"seen": 3}

    def set_extra_state(self, state: Any) -> None:  # noqa: ANN401
        """Forget it."""


class _WithCopies(nn.Linear):
    def state_dict(self, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        """Return copies."""
        return {
            name: tensor.clone() for name, tensor in super().state_dict(*args, **kwargs).items()
        }


def _buffer(tensor: Tensor, name: str = "entry") -> Callable[[], nn.Module]:
    return _with(lambda model: model.register_buffer(name, tensor))


def _frozen() -> nn.Module:
    return nn.Linear(NUM_FEATURES, NUM_CLASSES).requires_grad_(requires_grad=False)


def _infinite() -> nn.Module:
    return _with(lambda model: model.bias.data.fill_(-math.inf))()


REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "extra_state": (
        lambda: _WithExtraState(NUM_FEATURES, NUM_CLASSES),
        "entry '_extra_state' of the state_dict is a dict .* register a buffer",
    ),
    "lazy": (lambda: nn.LazyLinear(NUM_CLASSES), "entry 'weight' of a lazy module has no shape"),
    "sparse": (_buffer(torch.eye(3).to_sparse()), "entry 'entry' is sparse .* make it dense"),
    "no_parameters": (lambda: nn.Sequential(nn.Flatten()), "no parameter that learns"),
    "frozen": (_frozen, "no parameter that learns"),
    "metadata": (
        _with(lambda model: model.register_parameter("__metadata__", nn.Parameter(torch.ones(1)))),
        "'__metadata__', which the safetensors format reserves",
    ),
    "surrogate": (_buffer(torch.ones(1), "\ud800"), "can't be written as UTF-8"),
    "complex_numbers": (_buffer(torch.ones(2, dtype=torch.complex64)), "has dtype torch.complex64"),
    "float8": (_buffer(torch.ones(2).to(torch.float8_e4m3fn)), "has dtype torch.float8_e4m3fn"),
    "quantised": (
        _with(
            lambda model: model.register_buffer(
                "entry", torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.quint8)
            )
        ),
        "has dtype torch.quint8",
    ),
    "meta": (lambda: nn.Linear(2, 2, device="meta"), "is on the meta device and has no values"),
    "copies": (lambda: _WithCopies(NUM_FEATURES, NUM_CLASSES), "is a copy, not one of the model's"),
    "infinite": (_infinite, "parameter 'bias' holds a NaN or an infinity before the first"),
    "no_module": (lambda: {"weight": 1}, "build_model returned a dict"),  # type: ignore[dict-item, return-value]
}

_DECLARED_WRONGLY: dict[str, tuple[Callable[[], nn.Module], Mapping[str, str], str]] = {
    "no_such_entry": (Whole, {"quue": "local"}, "the pattern 'quue' matches no entry"),
    "half_of_a_tie": (Whole, {"tied.*": "local"}, "are one tensor, but 'tied.weight' is declared"),
    "largest_parameter": (Whole, {"head.*": "max"}, "is a parameter and can't be declared max"),
    "mean_of_booleans": (Whole, {"mask": "mean"}, "entry 'mask' is boolean and has no mean"),
}

WORDS: dict[str, str] = {name: words for name, (_, words) in REFUSED.items()} | {
    name: words for name, (_, _, words) in _DECLARED_WRONGLY.items()
}
"""What a server says of each of the tasks that it refuses."""

globals().update({name: _task(name, build) for name, (build, _) in REFUSED.items()})
globals().update(
    {name: _task(name, build, kinds) for name, (build, kinds, _) in _DECLARED_WRONGLY.items()}
)
