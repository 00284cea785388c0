"""A server that speaks OpenAI's API over a scheduler: FastAPI, uvicorn, Prometheus.

process.py    socket, signals, drain           app.py      routes
guard.py      keys, sizes, the log's lines     schema.py   bodies
exchange.py   a request's jobs                 reply.py    what is sent back
metrics.py    Prometheus                       problem.py  errors
"""
