# Two images from one file:
#
#   docker build --target operator -t kubedistill/operator:0.1.0 .
#   docker build --target trainer  -t kubedistill/trainer:0.1.0 .
#
# Base images are pinned by tag here. A release pins them by content as well, by
#   --build-arg PYTHON_DIGEST=sha256:… --build-arg TRAINER_DIGEST=sha256:… --build-arg UV_DIGEST=sha256:…
# An empty digest leaves the tag alone.
ARG PYTHON_IMAGE=docker.io/library/python:3.11-slim-bookworm
ARG PYTHON_DIGEST=
# PyTorch's wheels bring CUDA, cuDNN and NCCL, so that the trainer needs only the driver, which the
# container runtime mounts. Any other base works that has Python 3.11 in /usr/local/bin.
ARG TRAINER_IMAGE=docker.io/library/python:3.11-slim-bookworm
ARG TRAINER_DIGEST=
ARG UV_IMAGE=ghcr.io/astral-sh/uv:0.13.9
ARG UV_DIGEST=

FROM ${UV_IMAGE}${UV_DIGEST:+@${UV_DIGEST}} AS uv

# What both images are built from. Only uv.lock decides what is installed.
FROM ${PYTHON_IMAGE}${PYTHON_DIGEST:+@${PYTHON_DIGEST}} AS source
COPY --from=uv /uv /usr/local/bin/uv
ENV UV_PROJECT_ENVIRONMENT=/opt/kubedistill
ENV UV_PYTHON=/usr/local/bin/python3.11
ENV UV_PYTHON_DOWNLOADS=never
ENV UV_LINK_MODE=copy
ENV UV_COMPILE_BYTECODE=1
WORKDIR /source
COPY pyproject.toml uv.lock README.md LICENSE ./

FROM source AS operator-environment
# Dependencies first: they change less often than the project.
RUN --mount=type=cache,target=/root/.cache/uv \
    uv sync --frozen --no-dev --extra operator --no-install-project
COPY crds/kubedistill_api crds/kubedistill_api
COPY operator/kubedistill_operator operator/kubedistill_operator
COPY trainer_image/kubedistill_trainer trainer_image/kubedistill_trainer
RUN --mount=type=cache,target=/root/.cache/uv \
    uv sync --frozen --no-dev --extra operator --no-editable

FROM source AS trainer-environment
# `lm-eval`: with the tasks of lm-eval (spec.evaluation.lmEval).
ARG TRAINER_EXTRAS=
RUN --mount=type=cache,target=/root/.cache/uv \
    uv sync --frozen --no-dev --extra trainer --no-install-project \
    ${TRAINER_EXTRAS:+--extra ${TRAINER_EXTRAS}}
COPY crds/kubedistill_api crds/kubedistill_api
COPY operator/kubedistill_operator operator/kubedistill_operator
COPY trainer_image/kubedistill_trainer trainer_image/kubedistill_trainer
RUN --mount=type=cache,target=/root/.cache/uv \
    uv sync --frozen --no-dev --extra trainer --no-editable \
    ${TRAINER_EXTRAS:+--extra ${TRAINER_EXTRAS}}

FROM ${PYTHON_IMAGE}${PYTHON_DIGEST:+@${PYTHON_DIGEST}} AS operator
LABEL org.opencontainers.image.title="kubedistill operator"
LABEL org.opencontainers.image.description="Runs DistillationJobs and DistillationChains on Kubernetes"
LABEL org.opencontainers.image.version="0.1.0"
LABEL org.opencontainers.image.licenses="Apache-2.0"
RUN groupadd --gid 65532 kubedistill \
    && useradd --uid 65532 --gid 65532 --home-dir /workspace --no-create-home kubedistill
COPY --from=operator-environment /opt/kubedistill /opt/kubedistill
ENV PATH=/opt/kubedistill/bin:/usr/local/bin:/usr/bin:/bin
ENV PYTHONUNBUFFERED=1
ENV PYTHONDONTWRITEBYTECODE=1
WORKDIR /workspace
USER 65532:65532
# Probes and metrics.
EXPOSE 8080
ENTRYPOINT ["kubedistill-operator"]

FROM ${TRAINER_IMAGE}${TRAINER_DIGEST:+@${TRAINER_DIGEST}} AS trainer
LABEL org.opencontainers.image.title="kubedistill trainer"
LABEL org.opencontainers.image.description="Trains, teaches and checks for a DistillationJob"
LABEL org.opencontainers.image.version="0.1.0"
LABEL org.opencontainers.image.licenses="Apache-2.0"
# Triton compiles its launchers at run time with a C compiler. Their versions are the base image's.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/* \
    && groupadd --gid 65532 kubedistill \
    && useradd --uid 65532 --gid 65532 --home-dir /workspace --no-create-home kubedistill
COPY --from=trainer-environment /opt/kubedistill /opt/kubedistill
ENV PATH=/opt/kubedistill/bin:/usr/local/bin:/usr/bin:/bin
ENV PYTHONUNBUFFERED=1
ENV PYTHONDONTWRITEBYTECODE=1
ENV HF_HUB_OFFLINE=1
# Not a secret, whatever its name holds.
# hadolint ignore=DL3064
ENV TOKENIZERS_PARALLELISM=false
ENV NVIDIA_DRIVER_CAPABILITIES=compute,utility
WORKDIR /workspace
USER 65532:65532
# Progress and metrics of local rank 0; rank r serves on 9400 + r.
EXPOSE 9400
ENTRYPOINT ["kubedistill-trainer"]
