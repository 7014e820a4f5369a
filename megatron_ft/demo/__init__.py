"""What `megatron-ft demo` needs: a small chat set, a tiny random model, checks of what came out, and its pages.

Drives the other commands as a user would, in processes of their own; knows nothing of how they work.
"""
