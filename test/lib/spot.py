#!/usr/bin/env python3
"""The test cloud with what moto lacks of persistent spot requests.

    spot.py -H HOST -p PORT           as moto_server; cloud.py start DIR runs it

In moto RunInstances makes no spot request, and a request cannot be cancelled twice. As in AWS an instance of a persistent one
says of which it is, which has the tags that were given for it; as long as it is active another instance, without tags,
takes the place of one that is terminated; and where it is cancelled while its instance is stopped, that is terminated.
"""

import sys

from moto.ec2.exceptions import EC2ClientError
from moto.ec2.models import EC2Backend
from moto.ec2.models.core import TaggedEC2Resource
from moto.ec2.models.instances import Instance
from moto.ec2.responses.instances import InstanceResponse
from moto.ec2.utils import filter_dict_attribute_mapping, random_spot_request_id
from moto.server import main


class Request:
    def __init__(self, backend, instance, tags):
        self.ec2_backend, self.id, self.state, self.instance = backend, random_spot_request_id(), "active", instance
        backend.spot_instance_requests[self.id] = self
        instance.spot_instance_request_id = self.id
        backend.create_tags([self.id], tags)

    get_tags, get_filter_value = TaggedEC2Resource.get_tags, TaggedEC2Resource.get_filter_value

    @property
    def spot_instance_request_id(self):
        return self.id

    def relaunch(self):
        old = self.instance
        self.instance = self.ec2_backend.run_instances(
            old.image_id, 1, old.user_data, [], instance_type=old.instance_type, is_instance_type_default=False,
            subnet_id=old.subnet_id, instance_market_options="spot",
        ).instances[0]
        self.instance.spot_instance_request_id = self.id


moto_run, moto_terminate = InstanceResponse.run_instances, EC2Backend.terminate_instances


def run_instances(self):
    answer = moto_run(self)
    if self._get_param("InstanceMarketOptions.SpotOptions.SpotInstanceType") == "persistent":
        for instance in answer.result.instances:
            Request(self.ec2_backend, instance, self._parse_tag_specification().get("spot-instances-request", {}))
    return answer


def terminate_instances(self, instance_ids):
    ended = moto_terminate(self, instance_ids)
    for request in list(self.spot_instance_requests.values()):
        if request.state == "active" and request.instance in [instance for instance, _ in ended]:
            request.relaunch()
    return ended


def cancel_spot_instance_requests(self, request_ids):
    for one in request_ids:
        if one not in self.spot_instance_requests:
            raise EC2ClientError("InvalidSpotInstanceRequestID.NotFound", f"The spot instance request ID '{one}' does not exist")
    requests = [self.spot_instance_requests[one] for one in request_ids]
    for request in requests:
        request.state = "cancelled"
        if request.instance._state.name == "stopped":
            request.instance.terminate()
    return requests


Instance.spot_instance_request_id = None
filter_dict_attribute_mapping["spot-instance-request-id"] = "spot_instance_request_id"
InstanceResponse.run_instances = run_instances
EC2Backend.terminate_instances = terminate_instances
EC2Backend.cancel_spot_instance_requests = cancel_spot_instance_requests

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
