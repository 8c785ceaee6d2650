FROM python:3.13-slim

WORKDIR /openchat
COPY requirements.lock .
RUN pip install --no-cache-dir --require-hashes -r requirements.lock
COPY . .
RUN pip install --no-cache-dir --no-deps . && useradd --system --home-dir /var/lib/openchat --create-home openchat

USER openchat
WORKDIR /var/lib/openchat
EXPOSE 8000
CMD ["openchat"]
