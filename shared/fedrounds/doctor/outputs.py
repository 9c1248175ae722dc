"""What a `compute_loss` returns: the loss, and the outputs that answer the labels."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from fedrounds.errors import InvalidInput
from fedrounds.nested import items_of, leaves_of


def loss_and_outputs(computed: Any) -> tuple[Tensor, Any]:  # noqa: ANN401  # the user's
    """Return the loss and the outputs (None: not known) that a `compute_loss` returned.

    Raises:
        InvalidInput: the result holds no loss that is a single number.
    """
    loss, outputs = computed, None
    if isinstance(computed, tuple) and len(computed) == 2:
        loss, outputs = computed
    elif isinstance(computed, Mapping):
        loss, outputs = computed.get("loss"), computed
    elif not isinstance(computed, Tensor):
        loss, outputs = getattr(computed, "loss", None), computed
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        kind = (
            f"a tensor of {loss.numel()} numbers" if isinstance(loss, Tensor) else str(type(loss))
        )
        raise InvalidInput(
            f"compute_loss gives {kind} as the loss; it must return a tensor of one number, or "
            "(loss, outputs), or a dictionary or an object with `loss`"
        )
    return loss, outputs


def answers_of(outputs: object, num_samples: int) -> Tensor | None:
    """Return the outputs that answer the labels: `logits`, else the first floats with so many rows.

    None where there are none. A loss among the outputs is none.
    """
    if outputs is None or isinstance(outputs, Tensor):
        return outputs
    logits = dict(items_of(outputs) or ()).get("logits")
    leaves = [logits] if isinstance(logits, Tensor) else leaves_of(outputs)
    return next(
        (
            leaf
            for leaf in leaves
            if isinstance(leaf, Tensor)
            and leaf.is_floating_point()
            and leaf.ndim > 0
            and len(leaf) == num_samples
        ),
        None,
    )
