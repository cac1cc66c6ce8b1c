"""agentvm through SQLAlchemy 2 (psycopg): the URL is the one argument. Prints what went as it should."""

import sys
import uuid

from sqlalchemy import DateTime, Text, Uuid, bindparam, create_engine, exc, func, literal, select, text
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

engine = create_engine(sys.argv[1])


def expect(state, call):
    try:
        call()
    except exc.DBAPIError as error:
        assert error.orig.sqlstate == state, (error.orig.sqlstate, str(error))
        return error
    raise AssertionError(f"no error, expected {state}")


class Base(DeclarativeBase):
    pass


# the application's own row and the VM commit or roll back together
class Task(Base):
    __tablename__ = "task"
    name: Mapped[str] = mapped_column(primary_key=True)
    vm: Mapped[uuid.UUID | None]


class Vm(Base):
    __tablename__ = "sessions"
    __table_args__ = {"schema": "agentvm"}
    session_id: Mapped[uuid.UUID] = mapped_column(Uuid, primary_key=True)
    team_id: Mapped[str]
    agent_id: Mapped[str | None]
    state: Mapped[str]
    end_reason: Mapped[str | None]
    tags: Mapped[dict] = mapped_column(JSONB)
    created_at = mapped_column(DateTime(timezone=True))


Base.metadata.tables["task"].create(engine)


def provision(**options):
    return func.agentvm.provision(
        "acme", "coder", None, None, None, text("'{}'"), text("'[]'"), bindparam(None, {"by": "orm"}, JSONB), bindparam(None, options, JSONB), type_=Uuid
    )


def vms(db):
    return db.query(Vm).filter(Vm.tags["by"].astext == "orm").count()


with Session(engine) as db:
    task = Task(name="lost", vm=db.scalar(select(provision())))
    db.add(task)
    db.flush()
    assert db.get(Vm, task.vm).state == "provisioning"
    db.rollback()
    assert db.query(Task).count() == 0 and vms(db) == 0
    task = Task(name="kept", vm=db.scalar(select(provision())))
    db.add(task)
    db.commit()
    vm = db.get(Vm, task.vm)
    assert db.scalar(select(func.agentvm.wait(task.vm))) == "ready"
    db.refresh(vm)
    assert (vm.team_id, vm.agent_id, vm.tags) == ("acme", "coder", {"by": "orm"})
    assert db.scalar(select(func.agentvm.terminate(task.vm, "orm is done"))) is True
    db.commit()
    assert db.scalar(select(func.agentvm.wait(task.vm, "terminated"))) == "terminated"
    db.refresh(vm)
    assert (vm.state, vm.end_reason) == ("terminated", "requested")
    # a nested block that fails
    try:
        with db.begin_nested():
            db.execute(select(provision()))
            raise RuntimeError
    except RuntimeError:
        pass
    db.commit()
    assert vms(db) == 1
print("orm")

# as a default of the application's own row, in an INSERT of many rows
with Session(engine) as db:
    db.execute(text("INSERT INTO task SELECT 'task ' || i, agentvm.provision('acme') FROM generate_series(1, 20) i"))
    db.commit()
    for task in db.query(Task).filter(Task.name.like("task %")):
        assert db.scalar(select(func.agentvm.wait(task.vm))) == "ready"
        assert db.scalar(select(func.agentvm.terminate(task.vm)))
    db.commit()
print("many")

# autocommit for the procedures
with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as conn:
    vm = conn.scalar(select(provision()))
    assert conn.execute(text("CALL agentvm.await(:vm)"), {"vm": vm}).scalar() == "ready"
    conn.execute(select(func.agentvm.terminate(vm)))
    assert conn.execute(text("CALL agentvm.await(:vm, 'terminated')"), {"vm": vm}).scalar() == "terminated"
with engine.connect() as conn:
    error = expect("25001", lambda: conn.execute(text("CALL agentvm.await(:vm)"), {"vm": vm}))
    assert "autocommit" in error.orig.diag.message_hint
print("procedures")

# errors tell their SQLSTATE; those of ours are no IntegrityError and do not look like a lost connection
with engine.connect() as conn:
    error = expect("AV005", lambda: conn.execute(select(func.agentvm.status(uuid.uuid4()))))
    assert not error.connection_invalidated
    conn.rollback()
    expect("AV010", lambda: conn.execute(select(func.agentvm.provision("acme", literal(None, Text), literal(None, Text), "nowhere"))))
    conn.rollback()
    vm = conn.scalar(select(provision(launch_delay="1h")))
    expect("55000", lambda: conn.execute(select(func.agentvm.wait(vm))))
    conn.rollback()
    vm = conn.scalar(select(provision(launch_delay="1h")))
    conn.commit()
    expect("AV011", lambda: conn.execute(select(func.agentvm.wait(vm, "ready", text("interval '1 s'")))))
    conn.rollback()
    conn.execute(select(func.agentvm.terminate(vm)))
    conn.commit()
    vm = conn.scalar(select(provision(fail="credentials")))
    conn.commit()
    expect("AV001", lambda: conn.execute(select(func.agentvm.wait(vm))))
print("errors")
