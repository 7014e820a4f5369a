"""Estimates for a planned run: memory, idle time of pipeline stages, time per step, checkpoint size. Without torch."""
