# molmo_edge on a Jetson AGX Thor (JetPack 7, sm_110). Build it in the repository's directory:
#   docker build -f Dockerfile.thor -t molmo-edge:thor --platform linux/arm64 .
#   docker run --rm --runtime nvidia -v molmo-edge-cache:/cache molmo-edge:thor doctor
#   docker run --rm --runtime nvidia -v molmo-edge-cache:/cache -v /path/to/images:/work \
#       molmo-edge:thor ask photo.jpg "What is on the table?"
# The volume keeps checkpoints and everything compiled at start, so that the next start is warm.
# The aarch64 wheels of vLLM 0.32 contain machine code for sm_110, so a plain Python image suffices.
ARG LOCK=thor
ARG MACHINE=aarch64
ARG CONFIG=thor

# The same in Dockerfile.thor and Dockerfile.x86 from here on.
FROM python:3.12.12-slim-bookworm AS build
ARG LOCK
ARG MACHINE
WORKDIR /build
RUN test "$(uname -m)" = "$MACHINE"
RUN python -m venv /opt/molmo-edge
COPY requirements/${LOCK}.lock requirements/${LOCK}-tensorflow.lock requirements/
RUN /opt/molmo-edge/bin/pip install --no-cache-dir --require-hashes --only-binary :all: \
        -r requirements/${LOCK}.lock
# Only for resize = "tensorflow": --build-arg TENSORFLOW=1
ARG TENSORFLOW=0
RUN if [ "$TENSORFLOW" = 1 ]; then \
        /opt/molmo-edge/bin/pip install --no-cache-dir --require-hashes --only-binary :all: \
            -r requirements/${LOCK}-tensorflow.lock; \
    fi
COPY pyproject.toml README.md LICENSE ./
COPY molmo_edge molmo_edge
# setuptools, which builds it, is in the lock.
RUN /opt/molmo-edge/bin/pip install --no-cache-dir --no-deps --no-index --no-build-isolation .

FROM python:3.12.12-slim-bookworm
ARG CONFIG
# Triton compiles its launchers, and torch.compile its host code, with these at start. A Debian
# release has one version of each, so there is nothing to pin.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc g++ libc6-dev \
    && rm -rf /var/lib/apt/lists/*
# Not root; video is the group of GPU devices on a Jetson.
RUN groupadd --gid 10001 molmo \
    && useradd --uid 10001 --gid molmo --groups video --create-home molmo \
    && install --directory --owner molmo --group molmo /cache /work
COPY --from=build /opt/molmo-edge /opt/molmo-edge
COPY configs/${CONFIG}.toml /etc/molmo-edge/config.toml
ENV PATH=/opt/molmo-edge/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    MOLMO_EDGE_CONFIG=/etc/molmo-edge/config.toml \
    MOLMO_EDGE_CACHE_DIR=/cache \
    HF_HOME=/cache/huggingface \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
USER 10001:10001
WORKDIR /work
VOLUME ["/cache"]
# No server: the arguments of `docker run` are those of molmo-edge.
ENTRYPOINT ["molmo-edge"]
CMD ["doctor"]
