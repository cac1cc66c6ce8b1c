#!/usr/bin/env python3
"""The test cloud: moto as a server (spot.py) on a free port of 127.0.0.1, with request signatures verified.

    cloud.py start DIR [--iam]        start it; DIR keeps its log, its pid and cloud.json (address, keys, image, subnets);
                                      --iam: policies evaluated as AWS does, with resources and conditions (iam.py)
    cloud.py stop DIR                 end it
    cloud.py reset DIR                forget every instance; new keys
    cloud.py instances DIR            every instance the cloud knows of, as JSON; --running: pending or running only
    cloud.py user-data DIR ID         the user data that the instance was launched with, decoded
    cloud.py files DIR ID             the files that user data carries, as {path: content}
    cloud.py terminate|stop-instance DIR ID...   behind agentvm's back
    cloud.py account DIR NUMBER       another account, furnished like ours: keys, image, subnets
    cloud.py user DIR ACTION...       keys of another user, who may do only these (ec2:DescribeInstances, ...)
    cloud.py role DIR NAME ACTION...             a role that may do these, for anybody to assume; its ARN
    cloud.py call DIR SERVICE METHOD JSON        any boto3 call
    cloud.py calls DIR JSON           a list of [KEYS or null, SERVICE, METHOD, ARGUMENTS]; their answers, or {"error", "message"}
"""

import base64
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import boto3
from botocore.config import Config
from botocore.exceptions import ClientError
from botocore.parsers import ResponseParserError

REGION = "us-east-1"


def post(endpoint, path, body=b""):
    request = urllib.request.Request(endpoint + path, data=body, headers={"Content-Type": "text/plain"}, method="POST")
    with urllib.request.urlopen(request, timeout=10) as reply:
        return reply.read()


def client(cloud, service):
    made = boto3.client(
        service,
        region_name=REGION,
        endpoint_url=cloud["endpoint"],
        aws_access_key_id=cloud["access_key_id"],
        aws_secret_access_key=cloud["secret_access_key"],
        aws_session_token=cloud.get("session_token"),
        config=Config(retries={"total_max_attempts": 1}, connect_timeout=10, read_timeout=60),
    )
    if "account" in cloud:  # while nothing is verified moto believes whose account it is
        made.meta.events.register("before-sign", lambda request, **_: request.headers.add_header("x-moto-account-id", cloud["account"]))
    return made


def user(cloud, name, actions):
    """A new user with a policy that allows the actions; returns the access key."""
    iam = client(cloud, "iam")
    policy = {"Version": "2012-10-17", "Statement": [{"Effect": "Allow", "Action": actions, "Resource": "*"}]}
    iam.create_user(UserName=name)
    iam.put_user_policy(UserName=name, PolicyName="allow", PolicyDocument=json.dumps(policy))
    key = iam.create_access_key(UserName=name)["AccessKey"]
    return {"access_key_id": key["AccessKeyId"], "secret_access_key": key["SecretAccessKey"]}


def role(cloud, name, actions):
    """A new role that may do the actions; moto does not look at who assumes it."""
    iam = client(cloud, "iam")
    trust = {"Version": "2012-10-17", "Statement": [{"Effect": "Allow", "Principal": {"AWS": "*"}, "Action": "sts:AssumeRole"}]}
    policy = {"Version": "2012-10-17", "Statement": [{"Effect": "Allow", "Action": actions, "Resource": "*"}]}
    arn = iam.create_role(RoleName=name, AssumeRolePolicyDocument=json.dumps(trust))["Role"]["Arn"]
    iam.put_role_policy(RoleName=name, PolicyName="allow", PolicyDocument=json.dumps(policy))
    return arn


def furnish(endpoint, **account):
    """Make the account that the tests use, or one of another number, then have every signature verified."""
    cloud = {"endpoint": endpoint, "region": REGION, "access_key_id": "anyone", "secret_access_key": "anything", **account}
    ec2, iam = client(cloud, "ec2"), client(cloud, "iam")
    cloud["image_id"] = ec2.describe_images(Filters=[{"Name": "architecture", "Values": ["x86_64"]}])["Images"][0]["ImageId"]
    subnets = sorted(ec2.describe_subnets()["Subnets"], key=lambda subnet: subnet["AvailabilityZone"])
    cloud["subnet_ids"] = [subnet["SubnetId"] for subnet in subnets][:3]
    group = ec2.create_security_group(GroupName="agentvm", Description="agentvm", VpcId=subnets[0]["VpcId"])
    cloud["security_group_ids"] = [group["GroupId"]]
    iam.create_instance_profile(InstanceProfileName="agentvm-vm")
    cloud["instance_profile"] = "agentvm-vm"
    cloud["instance_type"] = "t3.micro"
    cloud.update(user(cloud, "agentvm", ["ec2:*", "iam:*", "sts:*", "ssm:*", "cloudformation:*"]))
    post(endpoint, "/moto-api/reset-auth", b"0")
    return cloud


def save(directory, cloud):
    (directory / "cloud.json").write_text(json.dumps(cloud))
    return cloud


def start(directory, strict):
    directory.mkdir(parents=True, exist_ok=True)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    checks = {"MOTO_ENABLE_AMI_VALIDATION": "1", "MOTO_EC2_ENABLE_INSTANCE_TYPE_VALIDATION": "1"}
    with open(directory / "moto.log", "ab") as log:
        server = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("iam.py" if strict else "spot.py")), "-H", "127.0.0.1", "-p", str(port)],
            cwd=directory, env={**os.environ, **checks}, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
        )
    endpoint = f"http://127.0.0.1:{port}"
    deadline = time.monotonic() + 60
    while True:
        try:
            urllib.request.urlopen(endpoint + "/moto-api/", timeout=5).read()
            break
        except OSError:
            if server.poll() is not None or time.monotonic() > deadline:
                sys.exit(f"moto does not answer; see {directory}/moto.log")
            time.sleep(0.05)
    return save(directory, {**furnish(endpoint), "pid": server.pid})


def reset(directory, cloud):
    post(cloud["endpoint"], "/moto-api/reset-auth", b"inf")
    post(cloud["endpoint"], "/moto-api/reset")
    return save(directory, {**furnish(cloud["endpoint"]), "pid": cloud["pid"]})


def account(cloud, number):
    post(cloud["endpoint"], "/moto-api/reset-auth", b"inf")
    return furnish(cloud["endpoint"], account=number)


def instances(cloud, running):
    found = []
    for page in client(cloud, "ec2").get_paginator("describe_instances").paginate():
        for instance in (i for reservation in page["Reservations"] for i in reservation["Instances"]):
            found.append({
                "id": instance["InstanceId"],
                "state": instance["State"]["Name"],
                "market": instance.get("InstanceLifecycle", "on-demand"),
                "type": instance["InstanceType"],
                "image": instance["ImageId"],
                "subnet": instance.get("SubnetId"),
                "zone": instance["Placement"]["AvailabilityZone"],
                "address": instance.get("PublicIpAddress") or instance.get("PrivateIpAddress"),
                "token": instance.get("ClientToken"),
                "tags": {tag["Key"]: tag["Value"] for tag in instance.get("Tags", [])},
            })
    return [i for i in found if not running or i["state"] in ("pending", "running")]


def user_data(cloud, instance):
    reply = client(cloud, "ec2").describe_instance_attribute(InstanceId=instance, Attribute="userData")
    return base64.b64decode(reply["UserData"]["Value"]).decode()


def files(script):
    """What the script's payload unpacks to: for each file a line "MODE PATH LINES", then its lines."""
    payload = base64.b64decode(re.search(r"^payload=['\"]?([A-Za-z0-9+/=]*)", script, re.M).group(1)).decode()
    lines, found = iter(payload.splitlines(keepends=True)), {}
    for header in lines:
        _mode, path, count = header.split()
        found[path] = "".join(next(lines) for _ in range(int(count)))
    return found


def answer(cloud, service, method, arguments):
    try:
        return getattr(client(cloud, service), method)(**arguments)
    except ClientError as error:
        return {"error": error.response["Error"]["Code"], "message": error.response["Error"]["Message"]}
    except ResponseParserError:  # an action that moto does not have
        return {"error": "NotImplemented", "message": "no XML"}


def main(command, directory, *rest):
    directory = Path(directory).resolve()
    if command == "start":
        return start(directory, "--iam" in rest)
    cloud = json.loads((directory / "cloud.json").read_text())
    if command == "stop":
        os.kill(cloud["pid"], signal.SIGTERM)
    elif command == "reset":
        return reset(directory, cloud)
    elif command == "instances":
        return instances(cloud, "--running" in rest)
    elif command == "user-data":
        return user_data(cloud, rest[0])
    elif command == "files":
        return files(user_data(cloud, rest[0]))
    elif command == "terminate":
        client(cloud, "ec2").terminate_instances(InstanceIds=list(rest))
    elif command == "stop-instance":
        client(cloud, "ec2").stop_instances(InstanceIds=list(rest))
    elif command == "account":
        return account(cloud, rest[0])
    elif command == "user":
        return user(cloud, f"user-{time.time_ns()}", list(rest))
    elif command == "role":
        return role(cloud, rest[0], list(rest[1:]))
    elif command == "call":
        return getattr(client(cloud, rest[0]), rest[1])(**json.loads(rest[2] if len(rest) > 2 else "{}"))
    elif command == "calls":
        return [answer({**cloud, "session_token": None, **(keys or {})}, *one) for keys, *one in json.loads(rest[0])]
    else:
        sys.exit(__doc__)
    return None


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    said = main(*sys.argv[1:])
    if said is not None:
        print(said if isinstance(said, str) else json.dumps(said, default=str))
