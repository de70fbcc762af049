# megakd on NVIDIA's PyTorch image, which brings torch, Transformer Engine and Apex built for each other.
#
#     docker build -t megakd .
#     docker build -t megakd --build-arg BASE_IMAGE=registry.example/pytorch:tag .
#
# megatron-core 0.16 asks for Transformer Engine >= 2.9, < 2.12; choose the base accordingly. The root file system may be
# mounted read-only (pyxis does): caches go to /tmp. Variables set here would win over those of a Slurm job, so only
# what is needed is set. The base's entrypoint stays.
ARG BASE_IMAGE=nvcr.io/nvidia/pytorch:25.12-py3
FROM ${BASE_IMAGE}

LABEL org.opencontainers.image.title="megakd" \
      org.opencontainers.image.description="Distils a large Megatron-Core GPT teacher into a smaller student" \
      org.opencontainers.image.licenses="Apache-2.0"

WORKDIR /opt/megakd
COPY setup.py pyproject.toml README.md LICENSE ./
COPY megakd ./megakd

# What the base has stays as it is: its versions are the constraints, so an install that would replace one of them fails.
# They are passed with -c and not as PIP_CONSTRAINT, which some bases set and which would bind the build environment too.
RUN python3 -m pip list --format=freeze --exclude-editable > base-packages.txt \
 && env -u PIP_CONSTRAINT python3 -m pip install --no-cache-dir --no-input -c base-packages.txt '.[plots]' \
 && rm -rf build megakd.egg-info \
 && python3 -m pip list --format=freeze > packages.txt \
 && megakd --version

ENV XDG_CACHE_HOME=/tmp/.cache \
    XDG_CONFIG_HOME=/tmp/.config \
    TRITON_CACHE_DIR=/tmp/.cache/triton

WORKDIR /workspace
