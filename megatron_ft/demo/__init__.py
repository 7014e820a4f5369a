"""The parts of `megatron-ft demo`: a small chat dataset, a tiny random model, checks of the results, and the report.

The demo starts the other commands as separate processes, as a user would, and imports none of them.
"""
