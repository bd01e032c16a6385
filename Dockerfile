FROM python:3.11-slim

WORKDIR /opt/concept-audit
COPY pyproject.toml README.md LICENSE ./
COPY backend backend
COPY app app
# What else is installed: "app,ray" makes an image for the workers of a Ray cluster, too.
ARG EXTRAS=app
RUN pip install --no-cache-dir -e ".[${EXTRAS}]"

RUN useradd --create-home auditor && mkdir /cache && chown auditor /cache
USER auditor
VOLUME /cache
EXPOSE 8501
HEALTHCHECK --start-period=10m --interval=30s CMD \
    python -c "import urllib.request as r; r.urlopen('http://127.0.0.1:8501/_stcore/health', timeout=5)"

# Inside a container 0.0.0.0 is the only address that can be published. The dashboard
# has no password: publish it to this machine alone, with -p 127.0.0.1:8501:8501.
ENTRYPOINT ["concept-audit"]
CMD ["demo", "--cache", "/cache", "--address", "0.0.0.0", "--port", "8501", "--no-browser"]
