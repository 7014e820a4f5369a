"""Our lines on the screen, everything in the file. In processes of their own: logging is global."""

import os
import subprocess
import sys

import pytest

CODE = """
import logging, sys, warnings
from megatron_ft.log import ONLY_IN_FILE, logger, setup
setup()
if len(sys.argv) > 1:
    setup("INFO", sys.argv[1])
warnings.warn("from a library")
logging.getLogger("megatron.core").warning("also from a library")
logger("training").info("iteration 1")
logger("training").info("kernels", extra=ONLY_IN_FILE)
logger("training").warning("option ignored")
logger("training").error("lost")
"""


def said(*argv, **environment):
    command = [sys.executable, "-c", CODE, *map(str, argv)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env={**os.environ, **environment})
    assert done.stdout == ""
    return done.stderr.splitlines()


@pytest.mark.parametrize("with_file", [False, True])
def test_the_screen_shows_only_ours(tmp_path, with_file):
    assert said(*[tmp_path / "log"] * with_file) == ["iteration 1", "warning: option ignored", "error: lost"]


def test_other_ranks_show_only_errors(tmp_path):
    assert said(RANK="3") == ["error: lost"]


def test_the_file_has_everything_once_and_warnings_of_every_rank(tmp_path):
    said(tmp_path / "run" / "log", RANK="0")
    said(tmp_path / "run" / "log", RANK="1")
    text = (tmp_path / "run" / "log").read_text()
    for part in ("from a library", "also from a library", "option ignored", "lost"):
        assert text.count(part) >= 2
    assert text.count("kernels") == 1
    assert text.count("iteration 1") == 1 and "INFO rank0 megatron_ft.training: iteration 1" in text
    assert "WARNING rank1 megatron.core: also from a library" in text
