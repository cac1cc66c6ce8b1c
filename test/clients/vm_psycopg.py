"""A VM through psycopg 3, in and out of transactions: vm_psycopg.py HOST PORT. Prints what went as it should."""

import sys

import psycopg

DSN = f"host={sys.argv[1]} port={sys.argv[2]} dbname=postgres user=app"

# outside: each statement by itself
with psycopg.connect(DSN, autocommit=True) as db:
    vm = db.execute("SELECT agentvm.provision('acme', profile => 'micro', agent_id => 'psycopg')").fetchone()[0]
    db.execute("CALL agentvm.await(%s)", [vm])
    row = db.execute("SELECT * FROM agentvm.exec(%s, 'read line; echo \"$line $WHO\"; echo oops >&2; exit 3', env => %s, stdin => %s)", [vm, '{"WHO": "psycopg"}', b"hello\n"]).fetchone()
    assert row[:3] == (3, "hello psycopg\n", "oops\n"), row
    assert row[3].total_seconds() < 60 and row[4:] == (False, False), row
    assert db.execute("SELECT agentvm.upload(%s, '/tmp/in/it', %s)", [vm, bytes(range(256))]).fetchone()[0] == 256
    assert db.execute("SELECT agentvm.download(%s, '/tmp/in/it')", [vm]).fetchone()[0] == bytes(range(256))
print("outside")

# inside: what a transaction that is rolled back has done in the VM has happened all the same
with psycopg.connect(DSN) as db:
    try:
        with db.transaction():
            assert db.execute("SELECT stdout FROM agentvm.exec(%s, 'echo kept >/tmp/kept; cat /tmp/kept')", [vm]).fetchone()[0] == "kept\n"
            other = db.execute("SELECT agentvm.provision('acme', profile => 'micro')").fetchone()[0]
            raise KeyError
    except KeyError:
        pass
    with db.transaction():
        assert db.execute("SELECT agentvm.download(%s, '/tmp/kept')", [vm]).fetchone()[0] == b"kept\n"
        assert db.execute("SELECT agentvm.status(%s) IS NULL", [vm]).fetchone()[0] is False
print("inside")


def sqlstate(query, *values):
    with psycopg.connect(DSN, autocommit=True) as db:
        try:
            db.execute(query, values)
        except psycopg.Error as error:
            return error.sqlstate


assert sqlstate("SELECT agentvm.exec(%s, 'true')", other) == "AV005"
assert sqlstate("SELECT agentvm.download(%s, '/nowhere')", vm) == "58P01"
with psycopg.connect(DSN) as db:
    with db.transaction():
        assert db.execute("SELECT agentvm.terminate(%s)", [vm]).fetchone()[0] is True
assert sqlstate("SELECT agentvm.exec(%s, 'true')", vm) == "AV006"
print("errors")
