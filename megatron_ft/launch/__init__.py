"""Starts the processes of a run on this machine, watches them, and ends with the exit code that they deserve. No torch here."""
