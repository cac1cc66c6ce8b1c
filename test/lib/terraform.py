#!/usr/bin/env python3
"""The locals of a Terraform file as JSON, without Terraform: terraform.py FILE REFERENCE=VALUE...

References are replaced in texts, as in "${var.region}" or as a value of their own; those to other locals are followed. What is
neither text, list, object nor a reference with a value is an error.
"""

import json
import re
import sys

import hcl2


def resolve(value, known):
    if isinstance(value, dict):
        return {key.strip('"'): resolve(one, known) for key, one in value.items() if not key.startswith("__")}
    if isinstance(value, list):
        return [resolve(one, known) for one in value]
    text = value[1:-1] if value.startswith('"') else value
    return re.sub(r"\$\{([^}]*)\}", lambda match: known[match[1]], text)


def main(path, *arguments):
    known = dict(argument.split("=", 1) for argument in arguments)
    with open(path, encoding="utf-8") as file:
        blocks = hcl2.load(file)["locals"]
    found = {}
    for block in blocks:
        for name, value in block.items():
            if not name.startswith("__"):
                found[name] = resolve(value, known)
                if isinstance(found[name], str):
                    known[f"local.{name}"] = found[name]
    print(json.dumps(found))


main(*sys.argv[1:])
