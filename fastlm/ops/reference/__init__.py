"""What each op computes, in plain PyTorch: the contract of every other backend, and the oracle.

Written to be read: nothing in place, nothing in chunks, sums kept in at least float32.  Each module
also holds the two yardsticks of the tolerance rule, ``truth_<step>`` (the definition in float64, in
slices small enough for long inputs) and ``plain_<step>`` (eager torch in the dtype of the output).
"""
