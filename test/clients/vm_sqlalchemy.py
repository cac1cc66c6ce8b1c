"""A VM through SQLAlchemy 2, in and out of transactions: vm_sqlalchemy.py HOST PORT. Prints what went as it should."""

import sys
import urllib.parse

from sqlalchemy import Integer, LargeBinary, Text, Uuid, create_engine, exc, func, select, text
from sqlalchemy.orm import Session

HOST, PORT = sys.argv[1:]
engine = create_engine(f"postgresql+psycopg://app@/postgres?host={urllib.parse.quote(HOST, safe='')}&port={PORT}")


def run(vm, command, **more):
    """exec() as a table of its columns"""
    call = func.agentvm.exec(vm, command).table_valued("exit_code", "stdout", "stderr", "duration", "timed_out", "truncated")
    return select(call.c.exit_code.cast(Integer), call.c.stdout.cast(Text), call.c.stderr.cast(Text))


def file(vm, path):
    return select(func.agentvm.download(vm, path, type_=LargeBinary))


# outside: the driver commits each statement
with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as db:
    vm = db.scalar(select(func.agentvm.provision("acme", "sqlalchemy", "micro", type_=Uuid)))
    db.execute(text("CALL agentvm.await(:vm)"), {"vm": vm})
    assert tuple(db.execute(run(vm, "echo out; echo err >&2; exit 7")).one()) == (7, "out\n", "err\n")
    assert db.scalar(select(func.agentvm.upload(vm, "/tmp/it", b"\x00\xff bytes"))) == 8
    assert db.scalar(file(vm, "/tmp/it")) == b"\x00\xff bytes"
print("outside")

with Session(engine) as db:
    assert db.execute(run(vm, "echo kept >/tmp/kept")).one().exit_code == 0
    other = db.scalar(select(func.agentvm.provision("acme", "sqlalchemy", "micro", type_=Uuid)))
    db.rollback()
    assert db.scalar(file(vm, "/tmp/kept")) == b"kept\n"
    db.commit()
print("inside")


def sqlstate(statement):
    with Session(engine) as db:
        try:
            db.execute(statement).all()
        except exc.DBAPIError as error:
            return error.orig.sqlstate


assert sqlstate(run(other, "true")) == "AV005"
assert sqlstate(file(vm, "/nowhere")) == "58P01"
with Session(engine) as db, db.begin():
    assert db.scalar(select(func.agentvm.terminate(vm))) is True
assert sqlstate(run(vm, "true")) == "AV006"
print("errors")
