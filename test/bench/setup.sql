-- Teams, and the floor: a table with the columns, defaults, checks and indexes of agentvm.session, and no triggers
SET client_min_messages = error;
CREATE EXTENSION agentvm CASCADE;
CREATE ROLE app LOGIN IN ROLE agentvm_user;
CREATE ROLE gw LOGIN IN ROLE agentvm_gateway;
-- that nobody dispatches is not to be told to the client and the log with every call
ALTER ROLE app SET client_min_messages = error;
ALTER ROLE app SET log_min_messages = fatal;
SELECT count(agentvm.create_team(prefix || i, 'noop', limits::jsonb)), count(agentvm.add_member(prefix || i, 'app'))
FROM (VALUES ('team', '{}', 1000), ('limited', '{"max_sessions": 1000000}', 1000), ('lone', '{"max_sessions": 1000000}', 1)) t (prefix, limits, teams),
	generate_series(1, teams) i;
CREATE TABLE floor (LIKE agentvm.session INCLUDING ALL);
GRANT INSERT ON floor TO app;
-- the floor pays for the same constraint
GRANT EXECUTE ON FUNCTION agentvm.session_is_sound(text, text, text, timestamptz, timestamptz) TO app;
