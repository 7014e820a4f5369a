"""The parts of `megatron-ft tune`: what it sees, what it chooses and why, the six commands, and how they are run.

It starts the other commands as separate processes, as a user would.
"""
