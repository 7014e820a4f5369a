"""Tensors in fp8, which there are none of: a class that no tensor is an instance of."""


class QuantizedTensor:
    pass
