import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def quiet_transformers():
    import transformers

    transformers.utils.logging.disable_progress_bar()
