"""What models can do and what they cost: measured, tabulated, drawn."""
