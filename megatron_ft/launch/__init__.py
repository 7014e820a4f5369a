"""Starts the processes of a run on this machine, watches them and returns one exit code. Without torch."""
