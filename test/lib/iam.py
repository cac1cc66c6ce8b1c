#!/usr/bin/env python3
"""The test cloud with IAM as AWS evaluates it: moto's server, whose own check knows neither resources nor conditions.

    iam.py -H HOST -p PORT            as moto_server; cloud.py start DIR --iam runs it

A call is split into what AWS asks for on its behalf: RunInstances needs ec2:RunInstances on each resource that it uses or
makes, ec2:CreateTags for the tags it sets, iam:PassRole for the role of an instance profile. Each must be allowed, with the
condition keys that AWS gives it (Service Authorization Reference, "Actions, resources, and condition keys" of EC2, STS and
Systems Manager); what an assumed role may do is cut by its session policy. Calls of other services are checked by action
and resource "*", as moto does. An operator that is not known here is an error, not a "yes".
"""

import json
import re
import sys
from urllib.parse import unquote

import spot  # noqa: F401 - what moto lacks of spot requests
from moto.core.exceptions import JsonRESTError
from moto.core.exceptions import _RESTError as RESTError
from moto.ec2.models import ec2_backends
from moto.iam import access_control
from moto.iam.models import iam_backends
from moto.server import main
from moto.sts.models import sts_backends


def as_list(value):
    return value if isinstance(value, list) else [value]


def matches(pattern, value):
    return re.fullmatch(re.escape(pattern).replace(r"\*", ".*").replace(r"\?", "."), value, re.S) is not None


OPERATORS = {
    "StringEquals": lambda wanted, value: wanted == value,
    "StringLike": matches,
    "ArnEquals": matches,
    "ArnLike": matches,
}


def condition_holds(operator, keys, context):
    """All keys of one operator, which are compared with any of their values; names of keys know no case."""
    for_all = operator.startswith("ForAllValues:")
    test = OPERATORS[operator.removeprefix("ForAllValues:")]
    context = {key.lower(): value for key, value in context.items()}
    for key, wanted in keys.items():
        values = as_list(context.get(key.lower(), []))
        hits = [any(test(str(one), value) for one in as_list(wanted)) for value in values]
        if not (all(hits) if for_all else hits and all(hits)):
            return False
    return True


def verdict(policies, action, resource, context, principal=None):
    """True: allowed, False: denied or not mentioned."""
    allowed = False
    for policy in policies:
        for statement in as_list(policy["Statement"]):
            unknown = set(statement) - {"Sid", "Effect", "Action", "Resource", "Condition", "Principal"}
            if unknown:
                raise ValueError(f"the test cloud does not know {unknown}")
            if not any(matches(one.lower(), action.lower()) for one in as_list(statement["Action"])):
                continue
            if "Resource" in statement and not any(matches(one, resource) for one in as_list(statement["Resource"])):
                continue
            if "Principal" in statement and principal not in as_list(statement["Principal"].get("AWS", [])):
                continue
            if not all(condition_holds(operator, keys, context) for operator, keys in statement.get("Condition", {}).items()):
                continue
            if statement["Effect"] != "Allow":
                return False
            allowed = True
    return allowed


class Call:
    """One request, and what it asks for: a list of (action, resource, context)."""

    def __init__(self, request):
        self.action, self.account, self.region = request._action, request.account_id, request._region
        data = request._data if isinstance(request._data, dict) else {}
        self.data = {key: as_list(value)[0] for key, value in data.items()}
        try:
            self.body = json.loads(request._body) if request._body else {}
        except ValueError:
            self.body = {}

    def arn(self, service, resource):
        return f"arn:aws:{service}:{self.region}:{self.account}:{resource}"

    def members(self, pattern):
        return [value for key, value in sorted(self.data.items()) if re.fullmatch(pattern, key)]

    def requested_tags(self, kind):
        """The condition keys of the tags that the call sets on what it makes of that kind."""
        tags, n = {}, 1
        while f"TagSpecification.{n}.ResourceType" in self.data:
            if self.data[f"TagSpecification.{n}.ResourceType"] == kind:
                i = 1
                while f"TagSpecification.{n}.Tag.{i}.Key" in self.data:
                    tags[self.data[f"TagSpecification.{n}.Tag.{i}.Key"]] = self.data[f"TagSpecification.{n}.Tag.{i}.Value"]
                    i += 1
            n += 1
        return tag_keys(tags)

    def run_instances(self):
        data, asks = self.data, []
        instance = {
            "ec2:MetadataHttpTokens": data.get("MetadataOptions.HttpTokens", "optional"),
            "ec2:InstanceType": data.get("InstanceType", "m1.small"),
            **self.requested_tags("instance"),
        }
        asks.append((self.arn("ec2", "instance/*"), instance))
        asks.append((self.arn("ec2", "volume/*"), self.requested_tags("volume")))
        asks.append((self.arn("ec2", "network-interface/*"), {}))
        asks.append((f"arn:aws:ec2:{self.region}::image/{data.get('ImageId')}", {}))
        asks.append((self.arn("ec2", f"subnet/{data.get('SubnetId', 'subnet-default')}"), {}))
        for group in self.members(r"SecurityGroupId\.\d+") or ["sg-default"]:
            asks.append((self.arn("ec2", f"security-group/{group}"), {}))
        if "KeyName" in data:
            asks.append((self.arn("ec2", f"key-pair/{data['KeyName']}"), {}))
        if data.get("InstanceMarketOptions.MarketType") == "spot":
            asks.append((self.arn("ec2", "spot-instances-request/*"), {}))
        asks = [("ec2:RunInstances", *ask) for ask in asks]
        for kind in ("instance", "volume", "spot-instances-request"):
            tags = self.requested_tags(kind)
            if tags:
                asks.append(("ec2:CreateTags", self.arn("ec2", f"{kind}/*"), {"ec2:CreateAction": "RunInstances", **tags}))
        profile = data.get("IamInstanceProfile.Name") or data.get("IamInstanceProfile.Arn", "").split("/")[-1]
        if profile:
            for role in iam_backends[self.account]["aws"].get_instance_profile(profile).roles:
                asks.append(("iam:PassRole", role.arn, {"iam:PassedToService": "ec2.amazonaws.com"}))
        return asks

    def own_tags(self, resource):
        """The condition keys of the tags that a resource has; one that is not there has none."""
        tags = ec2_backends[self.account][self.region].describe_tags(filters={"resource-id": [resource]})
        return {f"{service}:ResourceTag/{tag['key']}": tag["value"] for tag in tags for service in ("aws", "ec2")}

    def asks(self):
        service, name = self.action.split(":")
        if self.action == "ec2:RunInstances":
            return self.run_instances()
        if name in ("TerminateInstances", "StopInstances", "StartInstances"):
            return [(self.action, self.arn("ec2", f"instance/{one}"), self.own_tags(one)) for one in self.members(r"InstanceId\.\d+")]
        if name == "CancelSpotInstanceRequests":
            requests = self.members(r"SpotInstanceRequestId\.\d+")
            return [(self.action, self.arn("ec2", f"spot-instances-request/{one}"), self.own_tags(one)) for one in requests]
        if self.action == "ec2:CreateTags":
            tags = {self.data[f"Tag.{key.split('.')[1]}.Key"]: value for key, value in self.data.items() if re.fullmatch(r"Tag\.\d+\.Value", key)}
            return [
                (self.action, self.arn("ec2", f"{'spot-instances-request' if one.startswith('sir-') else 'instance'}/{one}"), {**tag_keys(tags), **self.own_tags(one)})
                for one in self.members(r"ResourceId\.\d+")
            ]
        if service == "ssm" and "Name" in self.body:
            return [(self.action, self.arn("ssm", f"parameter/{self.body['Name'].lstrip('/')}"), {})]
        if service == "ssm" and ("Path" in self.body or "Names" in self.body):
            names = self.body.get("Names") or [self.body["Path"]]
            return [(self.action, self.arn("ssm", f"parameter/{name.strip('/')}"), {}) for name in names]
        if self.action == "iam:CreateServiceLinkedRole":
            service = self.data["AWSServiceName"]
            return [(self.action, f"arn:aws:iam::{self.account}:role/aws-service-role/{service}/AWSServiceRoleForEC2Spot", {"iam:AWSServiceName": service})]
        if self.action == "sts:AssumeRole":
            context = {"sts:ExternalId": self.data["ExternalId"]} if "ExternalId" in self.data else {}
            return [(self.action, self.data["RoleArn"], context)]
        return [(self.action, "*", {})]


def tag_keys(tags):
    keys = {f"aws:RequestTag/{key}": value for key, value in tags.items()}
    return {**keys, "aws:TagKeys": list(tags)} if tags else {}


def document(policy):
    """Of a policy in any of the forms in which moto keeps them."""
    if isinstance(policy, access_control.Policy):
        policy = next(version.document for version in policy.versions if version.is_default)
    elif isinstance(policy, dict) and "policy_document" in policy:
        policy = policy["policy_document"]
    return json.loads(policy) if isinstance(policy, str) else policy


def not_allowed(request, action, resource):
    """As the service says it that was called."""
    who = request._access_key.arn
    text = f"User: {who} is not authorized to perform: {action} on resource: {resource} because no identity-based policy allows the {action} action"
    if request._service == "ec2":
        error = RESTError("UnauthorizedOperation", f"You are not authorized to perform this operation. {text}")
    elif request._headers.get("X-Amz-Target"):
        error = JsonRESTError("AccessDeniedException", text)
    else:
        error = RESTError("AccessDenied", text)
    error.code = 403
    return error


def check(request, _resource):
    if request._action == "sts:GetCallerIdentity":
        return  # always allowed
    key = request._access_key
    sets = [[document(policy) for policy in key.collect_policies()]]
    if isinstance(key, access_control.AssumedRoleAccessKey):
        session = next(
            role for role in sts_backends[key.account_id][key.partition].assumed_roles if role.access_key_id == key._access_key_id
        )
        if session.policy:
            sets.append([json.loads(unquote(session.policy))])
    for action, resource, context in Call(request).asks():
        allowed = all(verdict(policies, action, resource, context) for policies in sets)
        if action == "sts:AssumeRole":
            role = request.backend.get_role_by_arn(resource)
            trust = json.loads(role.assume_role_policy_document)
            allowed = allowed and verdict([trust], action, resource, context, principal=key.arn)
        if not allowed:
            raise not_allowed(request, action, resource)


access_control.IAMRequestBase.check_action_permitted = check

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
