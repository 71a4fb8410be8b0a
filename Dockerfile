# The library, its commands and the exact versions of constraints.txt, on the CPU:
#   docker build -t downslope . && docker run --rm -v "$PWD/outputs:/downslope/outputs" downslope lr=0.01
# With a GPU: --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cu130, and docker run --gpus all.
FROM python:3.11-slim
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
WORKDIR /downslope
COPY constraints.txt pyproject.toml README.md LICENSE ./
COPY src src
RUN pip install --no-cache-dir --extra-index-url "$TORCH_INDEX" -c constraints.txt -e .
COPY . .
RUN useradd --create-home learner && mkdir -p outputs && chown learner outputs
USER learner
ENTRYPOINT ["python", "scripts/train.py"]
