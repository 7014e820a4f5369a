"""The model, checkpoint and shards of the parallel tests."""

from tests.parallel.conftest import checkpoint, llama, shards  # noqa: F401 - fixtures
