# docker build -t unseen --build-arg COMMIT="$(git describe --always --dirty)" .
# docker run --rm --init -v "$PWD/runs:/unseen/runs" unseen
# docker run --rm --init --gpus all -v "$PWD/runs:/unseen/runs" unseen \
#     python bidist_mappo_meltingpot.py --device cuda
#
# On a cluster without Docker: the first line where Docker is, the others on the cluster.
#   docker save unseen -o unseen.tar
#   apptainer build unseen.sif docker-archive://unseen.tar
#   apptainer exec --nv --pwd /unseen --bind "$PWD/runs:/unseen/runs" unseen.sif \
#       python bidist_mappo_meltingpot.py --device cuda
#
# For PyTorch without CUDA, which makes the image some gigabytes smaller, add
#   --build-arg PIP_EXTRA_INDEX_URL=ADDRESS        (of the CPU build, from PyTorch's own selector)
# A mounted runs/ has to be writable for the user: --build-arg UID="$(id -u)".
#
# Not run yet, neither with Docker nor with Apptainer (docs/studies.md).
FROM python:3.12-slim

# The wheels bring everything else but a compiler, which torch.compile needs (--compile).
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ make \
    && rm -rf /var/lib/apt/lists/*

ARG UID=1000
RUN useradd --create-home --uid "$UID" unseen && install -d -o unseen /unseen
USER unseen
WORKDIR /unseen
ARG PIP_EXTRA_INDEX_URL
ARG MELTINGPOT_ASSETS=auto

# First what the environment is made from, so that a change elsewhere does not make it anew.
COPY --chown=unseen Makefile requirements-lock.txt ./
COPY --chown=unseen envs/meltingpot/install.py envs/meltingpot/
RUN make setup PIP_ARGS=--no-cache-dir

# numba keeps what it has compiled here; an image that is read only, as Apptainer's, needs a place.
ENV PATH=/unseen/.venv/bin:$PATH NUMBA_CACHE_DIR=/tmp/numba
COPY --chown=unseen . .
# Which commit runs are of: the image has no .git.
ARG COMMIT
ENV UNSEEN_COMMIT=$COMMIT
RUN mkdir -p runs
CMD ["make", "train"]
