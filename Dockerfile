# distill3d in a container.
#
#   docker build . --tag distill3d                             a CPU: the small torch of PyTorch's own index
#   docker build . --build-arg DEVICE=cuda --tag distill3d     an NVIDIA GPU: PyPI's torch, which brings CUDA
#   docker run --rm -v "$PWD/runs:/data/runs" distill3d generate "a red mushroom"
#   docker run --rm --gpus all -v "$PWD/runs:/data/runs" -v distill3d-models:/home/user/.cache/huggingface \
#     distill3d generate "a corgi" --prior sd21 --device cuda --dtype bfloat16
#
# Files in runs/ belong to the user 1000 unless --build-arg USER_ID=... says otherwise. A GPU needs NVIDIA's container
# toolkit on the host; no CUDA is needed in the image, torch's wheels have it.

ARG PYTHON=3.12
FROM python:${PYTHON}-slim

ARG DEVICE=cpu
ARG EXTRAS=bench,gltf,log
ARG USER_ID=1000
SHELL ["/bin/bash", "-o", "pipefail", "-c"]

# The versions that the tests run with. Triton's kernels are compiled for the GPU at their first use.
# hadolint ignore=DL3008
RUN if [ "$DEVICE" = cuda ]; then \
      apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*; \
    elif [ "$DEVICE" != cpu ]; then \
      echo "DEVICE must be cpu or cuda, got $DEVICE" >&2; exit 1; \
    fi

WORKDIR /opt/distill3d
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY src ./src
RUN index=""; if [ "$DEVICE" = cpu ]; then index="--extra-index-url https://download.pytorch.org/whl/cpu"; fi; \
    read -r -a more <<< "$index"; \
    pip install --no-cache-dir "${more[@]}" -c constraints.txt ".[$EXTRAS]" && \
    distill3d --version

RUN useradd --create-home --uid "$USER_ID" user && mkdir -p /data/runs && chown -R user /data
USER $USER_ID
WORKDIR /data
ENTRYPOINT ["distill3d"]
CMD ["--help"]
