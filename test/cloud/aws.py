#!/usr/bin/env python3
"""A look at the account that test/cloud uses, and its clean-up, by the tag agentvm-cluster, whose value is new with each run.

    aws.py list RUN                      the instances of a run, as JSON
    aws.py requests RUN                  the ids of its spot requests that AWS may yet launch from, as JSON
    aws.py end RUN [ID...]               terminate all of them that live, or those; returns when none lives any more
    aws.py watchdog RUN MINUTES PID      end them all when process PID has ended, or after so many minutes, together with it;
                                         it tries for as long again

The account is that of AGENTVM_CLOUD_*: see test/cloud/README.md.
"""

import json
import os
import signal
import sys
import time

import boto3
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError


def client():
    setting = {name: os.environ.get(f"AGENTVM_CLOUD_{name}") or None for name in ("REGION", "ENDPOINT_URL", "ACCESS_KEY_ID", "SECRET_ACCESS_KEY", "SESSION_TOKEN")}
    return boto3.client(
        "ec2",
        region_name=setting["REGION"],
        endpoint_url=setting["ENDPOINT_URL"],
        aws_access_key_id=setting["ACCESS_KEY_ID"],
        aws_secret_access_key=setting["SECRET_ACCESS_KEY"],
        aws_session_token=setting["SESSION_TOKEN"],
        config=Config(retries={"mode": "standard", "total_max_attempts": 5}, connect_timeout=10, read_timeout=60),
    )


def instances(ec2, run):
    found = []
    for page in ec2.get_paginator("describe_instances").paginate(Filters=[{"Name": "tag:agentvm-cluster", "Values": [run]}]):
        for instance in (one for reservation in page["Reservations"] for one in reservation["Instances"]):
            found.append({
                "id": instance["InstanceId"],
                "state": instance["State"]["Name"],
                "market": instance.get("InstanceLifecycle", "on-demand"),
                "request": instance.get("SpotInstanceRequestId"),
                "imds": instance.get("MetadataOptions", {}).get("HttpTokens"),
                "tags": {tag["Key"]: tag["Value"] for tag in instance.get("Tags", [])},
            })
    return found


def requests(ec2, run):
    filters = [{"Name": "tag:agentvm-cluster", "Values": [run]}, {"Name": "state", "Values": ["open", "active", "disabled"]}]
    return [one["SpotInstanceRequestId"] for one in ec2.describe_spot_instance_requests(Filters=filters)["SpotInstanceRequests"]]


def end(ec2, run, ids=()):
    """Terminate, and look again: an instance may be known a while after its launch only."""
    quiet = 0
    while quiet < 2:
        found = [one for one in instances(ec2, run) if one["state"] not in ("shutting-down", "terminated") and (not ids or one["id"] in ids)]
        living = [one["id"] for one in found]
        persistent = [one["request"] for one in found if one["request"] and "agentvm-spot" in one["tags"]]
        if persistent:  # or AWS would launch others
            ec2.cancel_spot_instance_requests(SpotInstanceRequestIds=persistent)
        for first in range(0, len(living), 100):
            ec2.terminate_instances(InstanceIds=living[first:first + 100])
        quiet = 0 if living else quiet + 1
        time.sleep(1)


def runs(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    with open(f"/proc/{pid}/stat", encoding="ascii", errors="replace") as stat:
        return stat.read().rpartition(")")[2].split()[0] != "Z"


def watchdog(run, minutes, pid):
    os.chdir("/")
    if os.getpgrp() != os.getpid():
        os.setsid()
    deadline = time.monotonic() + 60 * minutes
    print("watching", flush=True)
    while runs(pid) and time.monotonic() < deadline:
        time.sleep(0.5)
    if runs(pid):
        os.kill(pid, signal.SIGTERM)
    deadline = time.monotonic() + 60 * max(minutes, 1)
    while time.monotonic() < deadline:
        try:
            end(client(), run)
            print("ended", flush=True)
            return
        except (ClientError, BotoCoreError) as error:
            print(error, file=sys.stderr, flush=True)
            time.sleep(10)
    sys.exit(f"VMs with the tag agentvm-cluster = {run} may be left")


def main(command, run, *rest):
    if command == "list":
        print(json.dumps(instances(client(), run)))
    elif command == "requests":
        print(json.dumps(requests(client(), run)))
    elif command == "end":
        end(client(), run, rest)
    elif command == "watchdog":
        for one in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM):
            signal.signal(one, signal.SIG_IGN)
        watchdog(run, float(rest[0]), int(rest[1]))
    else:
        sys.exit(__doc__)


if len(sys.argv) < 3:
    sys.exit(__doc__)
main(*sys.argv[1:])
