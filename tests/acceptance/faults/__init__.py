"""Faults from outside, one a test: signals, a network that breaks, full disks, calls out of order.

Plain `pytest` runs a part; the full suite (see tests.tiers) and scripts/faults run everything.
"""
