# megatron_ft on NVIDIA GPUs. From the repository's root:
#   docker build -f docker/gpu.Dockerfile -t megatron_ft:gpu .
#   docker run --rm -it --gpus all --ipc=host --ulimit memlock=-1 megatron_ft:gpu megatron-ft doctor --check
#
# The image's own torch is kept: it was built for the image's CUDA. On NVIDIA's image, which has Transformer Engine, apex and flash-attn:
#   --build-arg BASE_IMAGE=nvcr.io/nvidia/pytorch:TAG
ARG BASE_IMAGE=pytorch/pytorch:2.11.0-cuda13.0-cudnn9-devel
FROM ${BASE_IMAGE}
RUN apt-get update \
 && apt-get install --yes --no-install-recommends git make procps \
 && rm -rf /var/lib/apt/lists/*
WORKDIR /opt/megatron_ft
COPY . .
# torch is pinned to what the image has. Such images forbid pip to touch their own packages, by
# PIP_CONSTRAINT; what they name stays theirs.
RUN python -c "import torch; print('torch==' + torch.__version__)" > /tmp/torch.txt \
 && pip install --no-cache-dir -c /tmp/torch.txt -e '.[hf,data,logging]' \
 && python -c "import torch, megatron.core; assert 'torch==' + torch.__version__ == open('/tmp/torch.txt').read().strip()"
# flash-attn is compiled here where no wheel fits (half an hour): docker build --build-arg FLASH_ATTN=1
ARG FLASH_ATTN=0
RUN if [ "$FLASH_ATTN" = 1 ]; then pip install --no-cache-dir --no-build-isolation 'flash-attn>=2.7'; fi
CMD ["megatron-ft", "doctor"]
