"""Diagnoses as the store keeps them: as part of their incident, in JSON."""

import math
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from pydantic import TypeAdapter

from fedrounds.diagnosis.text import verdict
from fedrounds.diagnosis.values import Diagnosis

_ADAPTER = TypeAdapter(Diagnosis)


def diagnosis_fields(diagnosis: Diagnosis | None) -> dict[str, Any]:
    """Return a diagnosis as an incident's fields: the verdict in words, and the whole as JSON.

    Numbers that aren't finite are held by their names; JSON has none.
    """
    if diagnosis is None:
        return {}
    return {"verdict": verdict(diagnosis), "diagnosis": _plain(asdict(diagnosis))}


def read_diagnosis(fields: Mapping[str, Any]) -> Diagnosis:
    """Return the diagnosis that the fields of an incident of this kind hold."""
    return _ADAPTER.validate_python(fields["diagnosis"])


def _plain(value: object) -> object:
    if isinstance(value, dict):
        return {name: _plain(member) for name, member in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value
