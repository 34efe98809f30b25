"""A server that takes lines and answers them, or runs them as commands: what a caller is logged in by.

PORT ENVIRONMENT, the latter "told", where commands find SSH_CONNECTION, or "stripped". Started under the name of sshd,
it is the ancestor that holds the connection of what it runs.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys


def main(port: str, environment: str) -> None:
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    listener = socket.create_server(("::", int(port)), family=socket.AF_INET6, dualstack_ipv6=True)
    print("listening", flush=True)
    while True:
        connection, _ = listener.accept()
        if os.fork():
            connection.close()
            continue
        listener.close()
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        serve(connection, environment)
        os._exit(0)


def serve(connection: socket.socket, environment: str) -> None:
    (far, far_port, *_), (here, port, *_) = connection.getpeername(), connection.getsockname()
    ends = f"{far.removeprefix('::ffff:')} {far_port} {here.removeprefix('::ffff:')} {port}"
    told = {"SSH_CONNECTION": ends} if environment == "told" else {}
    with connection.makefile("rw") as lines:
        for line in lines:
            words = json.loads(line)
            answer: object = "pong"
            if words:
                variables = {name: value for name, value in os.environ.items() if not name.startswith("SSH_")}
                done = subprocess.run(
                    words, env=variables | told, capture_output=True, text=True, timeout=60, check=False
                )
                answer = (done.returncode, done.stdout, done.stderr)
            lines.write(json.dumps(answer) + "\n")
            lines.flush()


if __name__ == "__main__":
    main(*sys.argv[1:])
