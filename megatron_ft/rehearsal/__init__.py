"""Rehearsals: a run made so small that any layout fits on one machine, with generated data and weights if they are missing."""
