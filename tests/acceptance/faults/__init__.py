"""Faults from outside, one a test: signals, a network that breaks, full disks, calls out of order.

Plain `pytest` runs a quick part; `FED_FAULTS=all` runs everything (see scripts/faults).
"""
