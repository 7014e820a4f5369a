# megatron_ft on CPU processes: to try it, and to run the tests. From the repository's root:
#   docker build -f docker/cpu.Dockerfile -t megatron_ft:cpu .
#   docker run --rm -it megatron_ft:cpu megatron-ft demo
# pip's default torch for Linux is the CUDA build of several GB. A smaller image:
#   --build-arg PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu
FROM python:3.11-slim-bookworm
RUN apt-get update \
 && apt-get install --yes --no-install-recommends git make procps \
 && rm -rf /var/lib/apt/lists/*
WORKDIR /opt/megatron_ft
# The versions that the tests run with. torch by itself: its layer stays when the source changes.
ARG PIP_EXTRA_INDEX_URL
COPY constraints.txt ./
RUN pip install --no-cache-dir -c constraints.txt torch
COPY . .
RUN pip install --no-cache-dir -c constraints.txt -e '.[dev]'
ENV OMP_NUM_THREADS=1
CMD ["megatron-ft", "doctor"]
