# opd_nb with what a run on a CPU or one GPU needs: docker build -t opd_nb . && docker run --rm -v "$PWD/runs:/runs" opd_nb demo --output-dir /runs/demo
FROM python:3.11-slim
RUN apt-get update && apt-get install -y --no-install-recommends build-essential cmake git && rm -rf /var/lib/apt/lists/*
WORKDIR /opd_nb
COPY settings.ini setup.py constraints.txt README.md MANIFEST.in ./
COPY opd_nb opd_nb
COPY nbs/runs nbs/runs
RUN pip install --no-cache-dir -c constraints.txt '.[gguf]'
WORKDIR /runs
ENTRYPOINT ["opd"]
CMD ["--help"]
