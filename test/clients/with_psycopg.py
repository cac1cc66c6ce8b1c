"""agentvm through psycopg 3: the connection string is the one argument. Prints what went as it should."""

import sys
import time

import psycopg
from psycopg import errors
from psycopg.types.json import Jsonb

dsn = sys.argv[1]
count = "SELECT count(*) FROM agentvm.sessions"


def expect(state, call):
    try:
        call()
    except psycopg.Error as error:
        assert error.sqlstate == state, (error.sqlstate, str(error))
        return error
    raise AssertionError(f"no error, expected {state}")


# in a transaction, with arguments of all kinds
with psycopg.connect(dsn) as conn:
    (before,) = conn.execute(count).fetchone()
    (session,) = conn.execute(
        "SELECT agentvm.provision(%s, agent_id => %s, env => %s, tags => %s, max_lifetime => %s, options => %s)",
        ("acme", "coder", Jsonb({"A": "ä\"'\\"}), Jsonb({"run": 7}), __import__("datetime").timedelta(minutes=30), Jsonb({"runtime": False})),
    ).fetchone()
    error = expect("55000", lambda: conn.execute("SELECT agentvm.wait(%s)", (session,)))
    assert "COMMIT first" in error.diag.message_hint
    assert isinstance(error, errors.ObjectNotInPrerequisiteState)
    conn.rollback()
    assert conn.execute(count).fetchone() == (before,)
    (session,) = conn.execute("SELECT agentvm.provision('acme', 'coder', tags => %s)", (Jsonb({"run": 8}),)).fetchone()
    conn.commit()
    assert conn.execute("SELECT agentvm.wait(%s)", (session,)).fetchone() == ("ready",)
    assert conn.execute("SELECT team_id, tags FROM agentvm.status(%s)", (session,)).fetchone() == ("acme", {"run": 8})
    conn.execute("SELECT agentvm.terminate(%s, %s)", (session, "done"))
    conn.rollback()
    assert conn.execute("SELECT state FROM agentvm.status(%s)", (session,)).fetchone() == ("ready",)
    assert conn.execute("SELECT agentvm.terminate(%s, %s)", (session, "done")).fetchone() == (True,)
    conn.commit()
    assert conn.execute("SELECT agentvm.wait(%s, 'terminated')", (session,)).fetchone() == ("terminated",)
    conn.commit()
    error = expect("AV006", lambda: conn.execute("SELECT agentvm.wait(%s)", (session,)))
    assert "requested" in error.diag.message_primary and error.diag.message_detail == "done"
    conn.rollback()
print("transaction")

# a failed block is a savepoint's failure only
with psycopg.connect(dsn) as conn:
    with conn.transaction():
        (kept,) = conn.execute("SELECT agentvm.provision('acme')").fetchone()
        try:
            with conn.transaction():
                conn.execute("SELECT agentvm.provision('acme', tags => '{\"lost\": true}')")
                raise RuntimeError
        except RuntimeError:
            pass
    assert conn.execute("SELECT count(*) FROM agentvm.sessions WHERE tags ? 'lost'").fetchone() == (0,)
    assert conn.execute("SELECT agentvm.wait(%s)", (kept,)).fetchone() == ("ready",)
print("savepoint")

# autocommit: the procedures, also with server-side prepared statements and in a pipeline
with psycopg.connect(dsn, autocommit=True, prepare_threshold=0) as conn:
    (session,) = conn.execute("SELECT agentvm.provision('acme')").fetchone()
    assert conn.execute("CALL agentvm.await(%s)", (session,)).fetchone() == ("ready",)
    conn.execute("SELECT agentvm.terminate(%s)", (session,))
    for _ in range(2):
        assert conn.execute("CALL agentvm.await(%s, 'terminated')", (session,)).fetchone() == ("terminated",)
    with conn.pipeline():
        cursors = [conn.execute("SELECT agentvm.provision('acme')") for _ in range(5)]
    ids = [cursor.fetchone()[0] for cursor in cursors]
    assert len(set(ids)) == 5 and ids == sorted(ids)
    for session in ids:
        assert conn.execute("SELECT agentvm.wait(%s)", (session,)).fetchone() == ("ready",)
        conn.execute("SELECT agentvm.terminate(%s)", (session,))
    with conn.transaction():
        expect("25001", lambda: conn.execute("CALL agentvm.await(%s)", (session,)))
        raise psycopg.Rollback
print("autocommit")

# errors by SQLSTATE; psycopg has no classes for AVxxx, so it is sqlstate that tells
with psycopg.connect(dsn, autocommit=True) as conn:
    (slow,) = conn.execute("SELECT agentvm.provision('acme', options => '{\"launch_delay\": \"1h\"}')").fetchone()
    try:
        conn.execute("SELECT agentvm.wait(%s, timeout => '1 second')", (slow,))
    except psycopg.Error as e:
        assert e.sqlstate == "AV011" and "did not become ready within 1 s" in str(e)
    expect("AV011", lambda: conn.execute("CALL agentvm.await(%s, timeout => '1 second')", (slow,)))
    expect("AV005", lambda: conn.execute("SELECT agentvm.terminate(gen_random_uuid())"))
    expect("AV010", lambda: conn.execute("SELECT agentvm.provision('acme', provider => 'nowhere')"))
    expect("AV012", lambda: conn.execute("SELECT agentvm.provision('acme', max_lifetime => '2 days')"))
    conn.execute("SELECT agentvm.provision('acme', idempotency_key => 'python')")
    expect("AV008", lambda: conn.execute("SELECT agentvm.provision('acme', 'other', idempotency_key => 'python')"))
    assert isinstance(expect("42704", lambda: conn.execute("SELECT agentvm.provision('nobody')")), errors.UndefinedObject)
    assert isinstance(expect("42501", lambda: conn.execute("SELECT agentvm.create_team('mine')")), errors.InsufficientPrivilege)
    assert isinstance(expect("42501", lambda: conn.execute("CALL agentvm.dispatch()")), errors.InsufficientPrivilege)
    conn.execute("SET statement_timeout = 300")
    begun = time.monotonic()
    assert isinstance(expect("57014", lambda: conn.execute("SELECT agentvm.wait(%s)", (slow,))), errors.QueryCanceled)
    expect("57014", lambda: conn.execute("CALL agentvm.await(%s)", (slow,)))
    assert time.monotonic() - begun < 5
    # a connection that was cancelled goes on
    conn.execute("RESET statement_timeout")
    assert conn.execute("SELECT agentvm.terminate(%s)", (slow,)).fetchone() == (True,)
    assert conn.execute("SELECT agentvm.wait(%s, 'terminated')", (slow,)).fetchone() == ("terminated",)
print("errors")

# levels of isolation, read only
for level in psycopg.IsolationLevel:
    with psycopg.connect(dsn) as conn:
        conn.isolation_level = level
        (session,) = conn.execute("SELECT agentvm.provision('acme')").fetchone()
        conn.commit()
        assert conn.execute("SELECT agentvm.wait(%s)", (session,)).fetchone() == ("ready",)
        conn.commit()
        conn.read_only = True
        assert conn.execute("SELECT agentvm.wait(%s)", (session,)).fetchone() == ("ready",)
        assert isinstance(expect("25006", lambda: conn.execute("SELECT agentvm.terminate(%s)", (session,))), errors.ReadOnlySqlTransaction)
        conn.rollback()
        conn.read_only = None
        conn.execute("SELECT agentvm.terminate(%s)", (session,))
print("isolation")
