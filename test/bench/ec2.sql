SELECT agentvm.create_team('ec2', 'ec2', '{}') \g /dev/null
SELECT agentvm.set_provider('ec2', 'ec2', '{"region": "us-east-1", "image_id": "ami-12345678", "instance_type": "t3.micro",
	"subnet_ids": ["subnet-12345678"], "security_group_ids": ["sg-12345678"]}', :'secrets') \g /dev/null
