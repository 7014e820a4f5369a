"""Arithmetic about a run that has not begun: will it fit, how much of the time do stages wait, how large is a checkpoint. No torch."""
