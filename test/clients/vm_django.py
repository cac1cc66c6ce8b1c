"""A VM through Django 5, in and out of transactions: vm_django.py HOST PORT. Prints what went as it should."""

import sys

import django
from django.conf import settings

settings.configure(
    DATABASES={"default": {"ENGINE": "django.db.backends.postgresql", "NAME": "postgres", "USER": "app", "HOST": sys.argv[1], "PORT": sys.argv[2]}},
    USE_TZ=True,
)
django.setup()

from django.db import connection, models, transaction  # noqa: E402
from django.db.utils import Error  # noqa: E402


class Vm(models.Model):
    """The team's sessions: the view is the model's table."""

    session_id = models.UUIDField(primary_key=True)
    team_id = models.TextField()
    agent_id = models.TextField(null=True)
    state = models.TextField()

    class Meta:
        app_label = "vms"
        managed = False
        db_table = 'agentvm"."sessions'


def call(sql, *values):
    with connection.cursor() as cursor:
        cursor.execute(sql, values)
        return cursor.fetchone() if cursor.description else None


# outside: Django commits each statement, unless told otherwise
(vm,) = call("SELECT agentvm.provision('acme', profile => 'micro', agent_id => 'django')")
call("CALL agentvm.await(%s)", vm)
assert Vm.objects.get(pk=vm).state == "ready"
assert call("SELECT exit_code, stdout, stderr FROM agentvm.exec(%s, 'echo out; echo err >&2; exit 7')", vm) == (7, "out\n", "err\n")
assert call("SELECT agentvm.upload(%s, '/tmp/it', %s)", vm, b"\x00\xff bytes") == (8,)
assert bytes(call("SELECT agentvm.download(%s, '/tmp/it')", vm)[0]) == b"\x00\xff bytes"
print("outside")

try:
    with transaction.atomic():
        assert call("SELECT exit_code FROM agentvm.exec(%s, 'echo kept >/tmp/kept')", vm) == (0,)
        (other,) = call("SELECT agentvm.provision('acme', profile => 'micro')")
        raise KeyError
except KeyError:
    pass
with transaction.atomic():
    assert bytes(call("SELECT agentvm.download(%s, '/tmp/kept')", vm)[0]) == b"kept\n"
assert not Vm.objects.filter(pk=other).exists()
print("inside")


def sqlstate(sql, *values):
    try:
        with transaction.atomic():
            call(sql, *values)
    except Error as error:
        return error.__cause__.sqlstate


assert sqlstate("SELECT agentvm.exec(%s, 'true')", other) == "AV005"
assert sqlstate("SELECT agentvm.download(%s, '/nowhere')", vm) == "58P01"
with transaction.atomic():
    assert call("SELECT agentvm.terminate(%s)", vm) == (True,)
assert sqlstate("SELECT agentvm.exec(%s, 'true')", vm) == "AV006"
print("errors")
