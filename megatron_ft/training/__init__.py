"""Training: one step for every layout, its optimizer, its checkpoints, and hooks."""
