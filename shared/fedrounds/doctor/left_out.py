"""The samples that a training leaves out: which, how many, and whether they are too many."""

from collections import Counter
from collections.abc import Sequence

from fedrounds.doctor.batches import Batch, batch_size, labels_of, take
from fedrounds.doctor.stepping import StepOutcome, TrainingState

_NUM_BATCHES = 4
"""So many batches may be left out whatever the share: the first few say little about it."""
_LEAST_OF_CLASS = 8
_SHARE_OF_CLASS = 0.1


class LeftOut:
    """Counts the samples given and those learned from; of these at most `max_share` may be missing.

    `indices` are the numbers in the data set of the samples that are left out singly. A class
    that makes up a tenth of the samples may not be missing altogether.
    """

    def __init__(self, *, max_share: float) -> None:
        self.indices: set[int] = set()
        self._max_share = max_share
        self._num_given = self._num_used = self._largest_batch = 0
        self._num_batches = 0
        self._labels_given: Counter[int] = Counter()
        self._labels_used: Counter[int] = Counter()

    def without(
        self, batch: Batch, indices: Sequence[int] | None
    ) -> tuple[Batch, Sequence[int] | None, bool]:
        """Return a batch without the samples to leave out, its indices, and whether none is left.

        A batch of which nothing would be left is returned as it is.
        """
        if not self.indices or indices is None:
            return batch, indices, False
        kept = [
            position for position, index in enumerate(indices) if int(index) not in self.indices
        ]
        if len(kept) == len(indices):
            return batch, indices, False
        if not kept:
            return batch, indices, True
        return take(batch, kept), [int(indices[position]) for position in kept], False

    def count(self, given: Batch, outcome: StepOutcome, training: TrainingState) -> None:
        """Count a step: the batch that was given, and what of it was learned from."""
        num_given = batch_size(given)
        num_used = outcome.batch_size if outcome.is_taken else 0
        self._num_batches += 1
        self._num_given += num_given
        self._num_used += num_used
        self._largest_batch = max(self._largest_batch, num_given)
        if num_used < num_given or self._labels_given:
            labels = labels_of(given, num_classes=training.num_classes)
            if labels is not None and labels.ndim == 1:
                # What the loss passes over is no class that could be missed.
                is_class = (label for label in labels.tolist() if label not in training.ignored)
                self._labels_given.update(is_class)
                if num_used and (used := outcome.labels) is not None:
                    self._labels_used.update(used.tolist())

    def excess(self) -> str | None:
        """Return which samples are left out too often, in words; None if none are."""
        num_missing = self._num_given - self._num_used
        if num_missing > max(self._max_share * self._num_given, _NUM_BATCHES * self._largest_batch):
            return f"{num_missing} of {self._num_given} samples"
        total = sum(self._labels_given.values())
        if self._num_batches < _NUM_BATCHES:
            return None
        for label, count in self._labels_given.items():
            is_large = count >= max(_LEAST_OF_CLASS, _SHARE_OF_CLASS * total)
            if is_large and self._labels_used[label] == 0 and self._labels_used:
                return f"every sample of a class, {count} of {total}"
        return None
