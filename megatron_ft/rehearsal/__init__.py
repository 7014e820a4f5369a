"""A run made so small that any layout of it fits on one machine: what is shrunk, and what is made up where it is not there yet."""
