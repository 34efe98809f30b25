"""Runs in the machine. `traffic.py serve WORD PORT` answers each connection with WORD; `traffic.py ask ADDRESS PORT`
connects again and again until its input ends, and prints how often it was answered by whom, as JSON.
"""

from __future__ import annotations

import json
import select
import socket
import sys
from collections import Counter


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


def ask(address: str, port: int) -> None:
    answers: Counter[str] = Counter()
    print("ready", flush=True)
    while not select.select([sys.stdin], [], [], 0)[0]:
        try:
            with socket.create_connection((address, port), 5) as connection:
                answers[connection.recv(100).decode() or "nothing"] += 1
        except OSError as error:
            answers[str(error)] += 1
    print(json.dumps(answers), flush=True)


if sys.argv[1] == "serve":
    serve(sys.argv[2], int(sys.argv[3]))
else:
    ask(sys.argv[2], int(sys.argv[3]))
