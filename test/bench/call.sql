SELECT agentvm.provision('ec2');
