"""The commands, one module each, in reading order. Slow imports are inside run()."""
