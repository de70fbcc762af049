# megakd on NVIDIA's PyTorch image, which brings torch, Transformer Engine and Apex built for each other:
#
#     docker build -t megakd .
#     docker run --gpus all --ipc=host -v /data:/data megakd train /data/kd.yaml
#     docker run --gpus all --ipc=host -v /data:/data --entrypoint torchrun megakd \
#         --standalone --nproc-per-node 8 -m megakd train /data/kd.yaml
#
# or on a plain Python image, for CPUs; README.md says how pip finds torch's CPU wheel (PIP_EXTRA_INDEX_URL):
#
#     docker build -t megakd-cpu --build-arg BASE_IMAGE=python:3.12-slim-bookworm .
#
# megatron-core 0.16 asks for Transformer Engine >= 2.9, < 2.12; choose another base accordingly. The root file system may
# be mounted read-only (pyxis does): caches go to /tmp. Variables set here would win over those of a Slurm job, so only
# what is needed is set.
ARG BASE_IMAGE=nvcr.io/nvidia/pytorch:25.12-py3
FROM ${BASE_IMAGE}
ARG PIP_EXTRA_INDEX_URL=

LABEL org.opencontainers.image.title="megakd" \
      org.opencontainers.image.description="Distils a large Megatron-Core GPT teacher into a smaller student" \
      org.opencontainers.image.licenses="Apache-2.0"

# Process 1 gets no signal that it has no handler for, and must bury what its children leave; tini does both, so that
# `docker stop` ends every verb. A user of its own, for nothing here needs root.
# hadolint ignore=DL3008
RUN apt-get update \
 && apt-get install --yes --no-install-recommends tini \
 && rm -rf /var/lib/apt/lists/* \
 && useradd --create-home --uid 10001 megakd \
 && install --directory --owner=megakd /workspace

WORKDIR /opt/megakd
COPY setup.py pyproject.toml README.md LICENSE ./
COPY constraints ./constraints
COPY megakd ./megakd

# What the base has stays as it is: its versions are the constraints, so an install that would replace one of them fails.
# A base without torch gets the versions that megakd was tested with. They are passed with -c and not as PIP_CONSTRAINT,
# which some bases set and which would bind the build environment too.
RUN --mount=type=cache,target=/root/.cache/pip \
    python3 -m pip list --format=freeze --exclude-editable > base-packages.txt \
 && tested="constraints/python$(python3 -c 'import sys; print("%d.%d" % sys.version_info[:2])').txt" \
 && if ! grep -q '^torch==' base-packages.txt; then cp "$tested" base-packages.txt; fi \
 && env -u PIP_CONSTRAINT python3 -m pip install --no-input -c base-packages.txt '.[plots]' \
 && rm -rf build megakd.egg-info \
 && python3 -m pip list --format=freeze > packages.txt \
 && megakd --version

ENV XDG_CACHE_HOME=/tmp/.cache \
    XDG_CONFIG_HOME=/tmp/.config \
    TRITON_CACHE_DIR=/tmp/.cache/triton

USER 10001
WORKDIR /workspace
ENTRYPOINT ["tini", "--", "megakd"]
CMD ["--help"]
