"""Settings of property tests."""

from hypothesis import settings

# How long an example takes says something about the machine's load, nothing about the code.
settings.register_profile("unit", deadline=None)
settings.load_profile("unit")
