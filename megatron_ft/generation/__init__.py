"""Generation: sampling (pure functions), decoding (in any layout) and loading of chat models."""
