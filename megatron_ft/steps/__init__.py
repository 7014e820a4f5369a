"""Commands run one after another, each in its own process, with their progress on the screen. `demo` and `tune` are made of such steps."""
