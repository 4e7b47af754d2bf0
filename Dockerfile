# docker build -t unseen .
# docker run --rm --init -v "$PWD/runs:/unseen/runs" unseen
#
# For PyTorch without CUDA, which makes the image some gigabytes smaller, add
#   --build-arg PIP_EXTRA_INDEX_URL=ADDRESS        (of the CPU build, from PyTorch's own selector)
FROM python:3.12-slim

# The wheels bring everything else: the engine needs only the C++ runtime, which is in the image.
RUN apt-get update \
    && apt-get install -y --no-install-recommends make \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /unseen
ARG PIP_EXTRA_INDEX_URL
ARG MELTINGPOT_ASSETS=auto

# First what the environment is made from, so that a change elsewhere does not make it anew.
COPY Makefile requirements-lock.txt ./
COPY envs/meltingpot/install.py envs/meltingpot/
RUN make setup PIP_ARGS=--no-cache-dir

COPY . .
CMD ["make", "train"]
