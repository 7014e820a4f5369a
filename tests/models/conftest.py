from tests.parallel.conftest import shards  # noqa: F401
