# SPDX-License-Identifier: Apache-2.0
# Everything that training on Hopper GPUs uses: the extension, Transformer Engine and DALI.
#
#   docker build -t megatron-keye .
#   docker run --gpus all --ipc host -v "$PWD/runs:/opt/megatron_keye/runs" megatron-keye \
#     megatron-keye train keye_tiny
#
# CUDA of torch's minor version, with the headers of cuDNN, which Transformer Engine compiles against.
FROM nvidia/cuda:13.0.2-cudnn-devel-ubuntu24.04

RUN apt-get update \
    && apt-get install -y --no-install-recommends git make python3.12 python3.12-dev python3.12-venv \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /opt/megatron_keye

# Apart from the sources, so that a change of those installs nothing anew.
COPY constraints.txt ./
RUN python3.12 -m venv .venv \
    && .venv/bin/pip install --no-cache-dir --no-deps -r constraints.txt

# No GPU is visible while an image is built, so it says what to build for.
ENV MEGATRON_KEYE_BUILD_CUDA=1 TORCH_CUDA_ARCH_LIST=9.0a NVTE_CUDA_ARCHS=90 NVTE_FRAMEWORK=pytorch
COPY . .
RUN .venv/bin/pip install --no-cache-dir --no-build-isolation -c constraints.txt -e ".[demo,gpu]" \
    && .venv/bin/pip check \
    && ls megatron_keye/_C*.so

ENV PATH=/opt/megatron_keye/.venv/bin:$PATH
CMD ["megatron-keye", "doctor"]
