# The image that docs/cluster/kubernetes.yaml names, for NVIDIA GPUs; without the argument, for CPUs:
#   docker build --tag cnn-jax:0.2.0.dev0 --build-arg EXTRA=cuda .
FROM python:3.13-slim

ARG EXTRA=""
WORKDIR /cnn-jax

COPY . .
# The wheels for CUDA bring its libraries; the host brings the driver.
RUN pip install --no-cache-dir --editable ".${EXTRA:+[$EXTRA]}"

# Not root: runs go to checkpoints/ or to a mounted volume, prepared data and compiled code to the home folder.
RUN useradd --uid 1000 --create-home trainer && chown trainer checkpoints
USER 1000

CMD ["python", "train.py", "--epochs", "15"]
