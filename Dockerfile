# A processor's: docker build -t latentdiff . && docker run --rm -v "$PWD:/work" latentdiff generate "a red car" -o car.png
# A GPU's: docker build -t latentdiff:gpu --build-arg TORCH= . && docker run --rm --gpus all -v "$PWD:/work" latentdiff:gpu ...
# A server's: docker run --rm -p 8000:8000 -e LATENTDIFF_API_KEY=... latentdiff serve --host 0.0.0.0
FROM python:3.12-slim

# torch's index: without CUDA. Empty: PyPI's torch, which brings CUDA's libraries along.
ARG TORCH=https://download.pytorch.org/whl/cpu
RUN if [ -n "$TORCH" ]; then pip install --no-cache-dir torch torchvision --index-url "$TORCH"; fi

# Without .git the version has to be said: --build-arg VERSION=0.1.0
ARG VERSION=0.0
COPY . /source
RUN SETUPTOOLS_SCM_PRETEND_VERSION_FOR_LATENTDIFF="$VERSION" pip install --no-cache-dir "/source[serve]" && rm -rf /source

RUN useradd --create-home --uid 1000 artist && mkdir /work && chown artist /work
USER 1000
WORKDIR /work
ENV HF_HUB_OFFLINE=1 LATENTDIFF_CACHE=/home/artist/cache
ENTRYPOINT ["latentdiff"]
CMD ["--help"]
