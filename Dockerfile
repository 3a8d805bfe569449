# `codebook serve` on CPUs, as a user without rights:
#   docker build --tag codebook .
#   docker run --publish 127.0.0.1:8000:8000 codebook miniature --keep 0.2
FROM python:3.11-slim

ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PYTHONUNBUFFERED=1 OMP_WAIT_POLICY=passive
RUN useradd --create-home --uid 10001 codebook
WORKDIR /source

# PyPI's torch for Linux brings gigabytes for GPUs; the one for CPUs is taken first, as 2.x+cpu is above 2.x.
COPY constraints.txt ./
RUN pip install --extra-index-url https://download.pytorch.org/whl/cpu --constraint constraints.txt torch
COPY pyproject.toml README.md LICENSE ./
COPY indexes ./indexes
COPY codebook ./codebook
RUN pip install --constraint constraints.txt '.[cpu,serve]'

USER codebook
WORKDIR /home/codebook
# Models and codebooks that were fetched are kept here, where a volume may lie; without it the volume would be root's.
RUN mkdir -p .cache
EXPOSE 8000
HEALTHCHECK --interval=30s --timeout=5s --start-period=120s \
  CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/health', timeout=4)"]
ENTRYPOINT ["codebook", "serve", "--host", "0.0.0.0", "--port", "8000"]
CMD ["miniature"]
