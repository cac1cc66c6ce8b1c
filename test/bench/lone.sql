SELECT agentvm.provision('lone1');
