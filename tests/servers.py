"""A server in a thread of the test, and its clients."""

from __future__ import annotations

import http.client
import json
import socket
import threading
import time
from contextlib import contextmanager

from featcache.serving.app import ServeOptions, create_app
from featcache.serving.server import bound, uvicorn_server


class Client:
    """Asks one server, a connection for each question."""

    def __init__(self, port, notes=()):
        self.port, self.notes = port, notes
        self.url = f"http://127.0.0.1:{port}"

    def ask(self, method, path, body=None, **headers):
        """Return status, headers and body, which is parsed if it is JSON."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        try:
            named = {name.replace("_", "-"): value for name, value in headers.items()}
            connection.request(method, path, body, named)
            answer = connection.getresponse()
            content = answer.read()
            kind = answer.getheader("content-type", "")
            shown = json.loads(content) if kind.startswith("application/json") else content
            return answer.status, dict(answer.headers), shown
        finally:
            connection.close()

    def get(self, path, **headers):
        return self.ask("GET", path, **headers)

    def predict(self, data, query="", **headers):
        return self.ask("POST", f"/predict{query}", data, **headers)

    def open(self, text=b""):
        """Return a connection on which something was sent."""
        connection = socket.create_connection(("127.0.0.1", self.port), timeout=30)
        connection.sendall(text)
        return connection

    def said(self, text=b""):
        """Return the first bytes that answer to others."""
        with self.open(text) as connection:
            try:
                return connection.recv(1000)
            except ConnectionResetError:
                return b""


def parts(*files, boundary="x"):
    """Return multipart/form-data of (name, content), and its content type."""
    said = 'Content-Disposition: form-data; name="f"; filename='
    lines = b"".join(
        f'--{boundary}\r\n{said}"{name}"\r\n\r\n'.encode() + content + b"\r\n"
        for name, content in files
    )
    return lines + f"--{boundary}--\r\n".encode(), f"multipart/form-data; boundary={boundary}"


@contextmanager
def served(head, **options):
    """Serve a head on a free port until the block ends."""
    options = ServeOptions(**{"port": 0, **options})
    notes = []
    app = create_app(head, options=options, on_note=notes.append)
    ready = threading.Event()
    with bound("127.0.0.1", 0) as listener:
        port = listener.getsockname()[1]
        server = uvicorn_server(app, options.connections, ready.set, notes.append)
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()
        try:
            assert ready.wait(60)
            yield Client(port, notes)
        finally:
            server.should_exit = True
            thread.join(30)
            assert not thread.is_alive()


def until(condition, timeout_s=20):
    """Wait until a condition holds."""
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)
