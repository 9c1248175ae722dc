"""The doctor's judge: planted faults, healthy runs, two baselines and the overhead.

Written from the doctor's contract alone, by somebody who had not seen its code.
"""
