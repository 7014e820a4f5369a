"""Names only, of the engine's annotations."""


class FusibleOperation:
    pass


class Sequential:
    pass
