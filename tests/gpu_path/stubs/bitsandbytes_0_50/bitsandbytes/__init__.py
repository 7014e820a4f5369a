"""bitsandbytes' dequantisation with the signatures of 0.50.2, computed from the levels one by one."""

from bitsandbytes import functional  # noqa: F401

__version__ = "0.50.2"
