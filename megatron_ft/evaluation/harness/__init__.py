"""lm-eval's tasks on our ranks. lm_eval is an extra: only lm.py and run.py import it."""
