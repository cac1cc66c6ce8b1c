SELECT agentvm.wait(('00000000-0000-7000-8000-' || lpad(to_hex(1 + :client_id), 12, '0'))::uuid, 'terminated', '1 hour');
