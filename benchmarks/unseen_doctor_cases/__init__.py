"""Faults and odd but healthy trainings for the doctor, made by someone who hasn't read its code.

`python -m benchmarks.unseen_doctor_cases --write` runs them and writes docs/doctor_unseen.md.
"""
