"""The commands: one recipe each, read top to bottom. Heavy imports happen inside run()."""
