"""Microseconds of CPU that boto3 needs for one run_instances() call, and calls a second, with 32 threads: boto.py ENDPOINT CALLS"""
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import boto3
from botocore.config import Config

THREADS = 32
endpoint, calls = sys.argv[1], int(sys.argv[2])
ec2 = boto3.client("ec2", region_name="us-east-1", endpoint_url=endpoint, aws_access_key_id="AKIAIOSFODNN7EXAMPLE", aws_secret_access_key="x" * 40,
                   config=Config(max_pool_connections=THREADS))


def run(i):
    tags = [{"Key": key, "Value": f"value-{i}"} for key in ("Name", "agentvm-session-id", "agentvm-team-id", "agentvm-managed-by", "agentvm-cluster")]
    ec2.run_instances(
        ImageId="ami-12345678", InstanceType="t3.micro", MinCount=1, MaxCount=1, ClientToken=f"{i:064x}", UserData="x" * 2000,
        InstanceInitiatedShutdownBehavior="terminate", MetadataOptions={"HttpTokens": "required", "HttpPutResponseHopLimit": 1},
        NetworkInterfaces=[{"DeviceIndex": 0, "SubnetId": "subnet-12345678", "Groups": ["sg-12345678"]}],
        InstanceMarketOptions={"MarketType": "spot"},
        TagSpecifications=[{"ResourceType": resource, "Tags": tags} for resource in ("instance", "volume")])


with ThreadPoolExecutor(THREADS) as pool:
    list(pool.map(run, range(THREADS)))  # connected
    cpu, began = time.process_time(), time.perf_counter()
    list(pool.map(run, range(THREADS, THREADS + calls)))
    print((time.process_time() - cpu) / calls * 1e6, calls / (time.perf_counter() - began))
