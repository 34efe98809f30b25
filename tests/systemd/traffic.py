"""Runs in the machine. `traffic.py serve WORD PORT` answers each connection with WORD; `traffic.py ask ADDRESS PORT`
connects again and again until its input ends, and prints how often it was answered by whom, as JSON. `traffic.py http
ADDRESS PORT` asks for a page each time, and counts by the listener of Envoy's that it came through.
"""

from __future__ import annotations

import http.client
import json
import select
import socket
import sys
from collections import Counter
from collections.abc import Callable


def serve(word: str, port: int) -> None:
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind(("0.0.0.0", port))
    listener.listen(512)
    print("ready", flush=True)
    while True:
        connection, _ = listener.accept()
        with connection:
            connection.sendall(word.encode())


def ask(address: str, port: int) -> str:
    with socket.create_connection((address, port), 5) as connection:
        return connection.recv(100).decode() or "nothing"


def page(address: str, port: int) -> str:
    connection = http.client.HTTPConnection(address, port, timeout=5)
    try:
        connection.request("GET", "/")
        answer = connection.getresponse()
        answer.read()
        return f"{answer.status} {answer.getheader('x-through', 'nobody')}"
    finally:
        connection.close()


def count(one: Callable[[str, int], str], address: str, port: int) -> None:
    answers: Counter[str] = Counter()
    print("ready", flush=True)
    while not select.select([sys.stdin], [], [], 0)[0]:
        try:
            answers[one(address, port)] += 1
        except (OSError, http.client.HTTPException) as error:
            answers[str(error)] += 1
    print(json.dumps(answers), flush=True)


if sys.argv[1] == "serve":
    serve(sys.argv[2], int(sys.argv[3]))
else:
    count(page if sys.argv[1] == "http" else ask, sys.argv[2], int(sys.argv[3]))
