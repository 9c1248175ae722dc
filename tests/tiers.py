"""Which tests run when: `scripts/test --quick`, `scripts/test`, `scripts/test --full`.

Quick are the unit tests; without a flag those with real processes run too, as in CI; the full suite
has every fault, larger payloads, and starts every process cold. A test of the full suite alone has
the mark FULL.
"""

import os

import pytest

IS_FULL = os.environ.get("FED_TESTS") == "full"

FULL = pytest.mark.skipif(not IS_FULL, reason="of the full suite: scripts/test --full")
