"""Microseconds of CPU that boto3 needs for one run_instances() call: boto.py ENDPOINT CALLS"""
import sys
import time

import boto3

endpoint, calls = sys.argv[1], int(sys.argv[2])
ec2 = boto3.client("ec2", region_name="us-east-1", endpoint_url=endpoint, aws_access_key_id="AKIAIOSFODNN7EXAMPLE", aws_secret_access_key="x" * 40)


def run(i):
    tags = [{"Key": key, "Value": f"value-{i}"} for key in ("Name", "agentvm-session-id", "agentvm-team-id", "agentvm-managed-by", "agentvm-cluster")]
    ec2.run_instances(
        ImageId="ami-12345678", InstanceType="t3.micro", MinCount=1, MaxCount=1, ClientToken=f"{i:064x}", UserData="x" * 2000,
        InstanceInitiatedShutdownBehavior="terminate", MetadataOptions={"HttpTokens": "required", "HttpPutResponseHopLimit": 1},
        NetworkInterfaces=[{"DeviceIndex": 0, "SubnetId": "subnet-12345678", "Groups": ["sg-12345678"]}],
        InstanceMarketOptions={"MarketType": "spot"},
        TagSpecifications=[{"ResourceType": resource, "Tags": tags} for resource in ("instance", "volume")])


run(0)
before = time.process_time()
for i in range(1, calls + 1):
    run(i)
print((time.process_time() - before) / calls * 1e6)
