-- Teams with an account each, whose EC2 is the canned endpoint
SELECT count(agentvm.create_team('account' || i, 'ec2', '{}')), count(agentvm.set_provider('account' || i, 'ec2', '{"region": "us-east-1",
	"image_id": "ami-12345678", "instance_type": "t3.micro", "subnet_ids": ["subnet-12345678"], "security_group_ids": ["sg-12345678"]}',
	jsonb_build_object('access_key_id', 'AKIA' || lpad(i::text, 16, '0'), 'secret_access_key', repeat('x', 40))))
FROM generate_series(1, :accounts) i WHERE NOT EXISTS (SELECT FROM agentvm.team WHERE team_id = 'account' || i) \g /dev/null
SELECT agentvm.create_profile('bare', 'ec2', runtime => false) WHERE NOT EXISTS (SELECT FROM agentvm.profile WHERE name = 'bare') \g /dev/null
