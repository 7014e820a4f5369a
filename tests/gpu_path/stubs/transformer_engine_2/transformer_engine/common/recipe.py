"""Names only."""


class Recipe:
    pass


class DelayedScaling(Recipe):
    pass
