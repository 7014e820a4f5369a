"""LoRA adapters: where they go, how they are computed in every layout, and their files."""
