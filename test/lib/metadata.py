#!/usr/bin/env python3
"""Stands in for the metadata service of an EC2 machine, version 2 only, on a free port of 127.0.0.1.

    metadata.py DIR

DIR/machine.json, read anew for each request, says how it is: {"role": name or null, "document": what the role's page has,
"pages": {path: [status, body]} in place of what is usual, "seconds": how long each answer takes}. What was asked is in
DIR/requests.log, a JSON object a line. Prints its address.
"""

import json
import secrets
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

directory = Path(sys.argv[1])
ROLES = "/latest/meta-data/iam/security-credentials/"
tokens = set()


class Machine(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def answer(self, status, body):
        request = {"method": self.command, "path": self.path, "status": status, "headers": {k.lower(): v for k, v in self.headers.items()}}
        with open(directory / "requests.log", "a", encoding="utf-8") as log:
            log.write(json.dumps(request) + "\n")
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body.encode())

    def page(self):
        machine = json.loads((directory / "machine.json").read_text())
        time.sleep(machine.get("seconds", 0))
        if self.path in machine.get("pages", {}):
            return machine["pages"][self.path]
        if self.command == "PUT" and self.path == "/latest/api/token":
            if not 1 <= int(self.headers.get("X-aws-ec2-metadata-token-ttl-seconds", "0")) <= 21600:
                return 400, ""
            token = secrets.token_urlsafe(40)
            tokens.add(token)
            return 200, token
        if self.headers.get("X-aws-ec2-metadata-token") not in tokens:
            return 401, ""
        if self.path == ROLES and machine.get("role"):
            return 200, machine["role"]
        if machine.get("role") and self.path == ROLES + machine["role"]:
            return 200, json.dumps(machine["document"], indent=2)
        return 404, "<html>not found</html>"

    def do_GET(self):
        self.answer(*self.page())

    do_PUT = do_GET

    def log_message(self, *_):
        pass


server = ThreadingHTTPServer(("127.0.0.1", 0), Machine)
print(f"http://127.0.0.1:{server.server_port}", flush=True)
server.serve_forever()
