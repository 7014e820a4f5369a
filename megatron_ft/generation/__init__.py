"""Generation: sampling (pure) and decoding (aware of the layout)."""
